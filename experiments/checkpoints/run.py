"""What saving costs a training step: python experiments/checkpoints/run.py [--models ...] [--rounds N]."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax
import orbax.checkpoint as ocp

import lora_jax as lora
from lora_jax.formats.orbax import Checkpoints
from lora_jax.training import State, make_step

HERE = Path(__file__).parent
FILE, STEPS = HERE / "results.json", 10


@contextlib.contextmanager
def savers(folder, frozen):
    """How a state is saved, by name, and how one waits for it."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        Checkpoints(folder / "lora_jax", frozen) as ours,
        ocp.CheckpointManager(folder / "orbax", options=options) as theirs,
    ):
        yield {
            "none": (lambda step, state: None, lambda: None),
            "lora_jax": (ours.save, ours.wait),
            "orbax": (
                lambda step, state: theirs.save(step, args=ocp.args.StandardSave(as_data(state))),
                theirs.wait_until_finished,
            ),
        }


def as_data(state):
    """What orbax takes: arrays of which none is a key."""
    return state.lora_params, state.opt_state, state.step, jax.random.key_data(state.key)


def clocks():
    return time.perf_counter(), time.process_time(), time.thread_time()


def since(before):
    return [after - was for after, was in zip(clocks(), before, strict=True)]


def measured(name, rounds):
    """Blocks of steps, each begun by a save or by none, which take turns."""
    sys.path.append(str(HERE.parent / "speed"))
    from models import MODELS, Task, plain

    task = Task.of(MODELS[name], "all_r16")
    loss, params = task.loss(plain), task.model.params()
    rules = {rf"layers/\d+/({'|'.join(task.names)})/kernel": lora.LoRA(task.rank)}
    sites = lora.sites(loss, params, task.batch)
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)
    tx = lora.optimizer(optax.adamw(1e-4))
    state = State.create(jax.random.key(1), lora_params, tx)
    step = make_step(loss, tx)
    arrays = jax.tree.leaves(as_data(state))
    row = {"model": name, "arrays": len(arrays), "bytes": sum(x.nbytes for x in arrays)}

    calls, blocks, alone = ({kind: [] for kind in ("none", "lora_jax", "orbax")} for _ in range(3))
    with tempfile.TemporaryDirectory() as folder, savers(Path(folder), frozen) as ways:
        for i in range(-1, rounds):  # the first warms up
            for kind, (save, wait) in ways.items():
                before = clocks()
                save(2 * i + 2, state)
                call = since(before)
                for _ in range(STEPS):
                    state, metrics = step(state, frozen, task.batch)
                    jax.block_until_ready((state, metrics))
                block = since(before)
                wait()
                before = clocks()
                save(2 * i + 3, state)
                wait()
                if i >= 0:
                    calls[kind].append(call), blocks[kind].append(block), alone[kind].append(since(before))
    row["step_s"] = statistics.median(wall for wall, _, _ in blocks["none"]) / STEPS
    row["step_cpu_s"] = statistics.median(cpu for _, cpu, _ in blocks["none"]) / STEPS
    for kind in ("lora_jax", "orbax"):
        wall, cpu = (
            [own[i] / none[i] - 1 for own, none in zip(blocks[kind], blocks["none"], strict=True)] for i in (0, 1)
        )
        row[kind] = {
            "call_ms": 1e3 * statistics.median(x[0] for x in calls[kind]),
            "call_fastest_ms": 1e3 * min(x[0] for x in calls[kind]),
            "call_cpu_ms": 1e3 * statistics.median(x[2] for x in calls[kind]),
            "whole_ms": 1e3 * statistics.median(x[0] for x in alone[kind]),
            "whole_fastest_ms": 1e3 * min(x[0] for x in alone[kind]),
            "whole_cpu_ms": 1e3 * statistics.median(x[1] for x in alone[kind]),
            "blocks_over_none": statistics.quantiles(wall, n=4),
            "blocks_cpu_over_none": statistics.quantiles(cpu, n=4),
        }
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["minilm", "gpt2"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, JAX {jax.__version__}"
    runs = json.loads(FILE.read_text()) if FILE.exists() else []
    for name in args.models:
        row = {"machine": machine, "rounds": args.rounds, "load": os.getloadavg()[0], **measured(name, args.rounds)}
        print(json.dumps(row, indent=1))
        runs = [run for run in runs if (run["machine"], run["model"]) != (machine, name)] + [row]
        FILE.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()

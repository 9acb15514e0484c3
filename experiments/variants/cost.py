"""What a step costs under each variant: python experiments/variants/cost.py [--models ...]; adds to costs.json.

FLOPs and bytes are XLA's; times are of steps that take turns in one process, over the neighboring step of LoRA.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from arms import ARMS
from training import BATCH, LENGTHS, begin, stepped, task_of

import lora_jax as lora
from lora_jax import tree
from lora_jax.demo import encoder
from lora_jax.demo.batches import draw

HERE = Path(__file__).parent
FILE = HERE / "costs.json"
GPT2 = {
    "LoRA": lora.LoRA(16),
    "DoRA": lora.DoRA(16),
    "LoHa": lora.LoHa(8),
    "LoKr": lora.LoKr(64, factor=4),
}


def of_minilm():
    """Every arm's step, with its arguments, on one batch of the demo's task."""
    task = task_of(encoder.load(), 0)
    batches = draw(np.random.default_rng(0), task.train, BATCH, 40)
    batch = next(batch for batch in batches if batch["input_ids"].shape[1] == LENGTHS[-1])
    for name, arm in ARMS.items():
        frozen, lora_params = begin(arm, task, 0, batches)
        step, start = stepped(arm, task)
        yield name, step, start(lora_params), frozen, batch, 1e-3


def of_gpt2():
    """Steps of GPT-2 small's shapes, all linear layers, 512 tokens, and with them DoRA's norms once a step."""
    sys.path.append(str(HERE.parent / "speed"))
    from models import MODELS, Task, plain

    task = Task.of(MODELS["gpt2"], "all_r16")
    loss_fn, params, tx = task.loss(plain), task.model.params(), lora.optimizer(optax.adamw(1e-4))
    sites = lora.sites(loss_fn, params, task.batch)
    for name, variant in GPT2.items():
        frozen, lora_params = lora.split(jax.random.key(0), params, {r"layers/.*/kernel": variant}, sites=sites)

        def step(state, frozen, batch):
            def objective(lora_params):
                return lora.lift(loss_fn)(lora.attach(frozen, lora_params), batch)

            lora_params, opt_state = state
            loss, grads = jax.value_and_grad(objective)(lora_params)
            updates, opt_state = tx.update(grads, opt_state, lora_params)
            return (optax.apply_updates(lora_params, updates), opt_state), loss

        yield name, jax.jit(step, donate_argnums=0), (lora_params, tx.init(lora_params)), frozen, task.batch


def measured(contenders, rounds):
    """For each contender XLA's figures, and the times of its steps, which take turns."""
    runs, rows = {}, {}
    for name, step, state, *rest in contenders:
        step = step.lower(state, *rest).compile()
        cost, memory = step.cost_analysis(), step.memory_analysis()
        rows[name] = {
            "gflop": round(cost["flops"] / 1e9, 3),
            "temporary_mb": round(memory.temp_size_in_bytes / 1e6, 2),
            "state_mb": round(tree.nbytes(state) / 1e6, 2),  # what trains, or is frozen beside it, and its moments
        }
        runs[name] = [step, state, *rest]
    times = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            step, state, *rest = run
            began = time.perf_counter()
            run[1], _ = jax.block_until_ready(step(state, *rest))
            if i > 1:  # two steps to warm up
                times[name].append(time.perf_counter() - began)
    for name, row in rows.items():
        ratios = [own / other for own, other in zip(times[name], times["LoRA"], strict=True)]
        row |= {"step_s": round(statistics.median(times[name]), 4), "fastest_s": round(min(times[name]), 4)}
        row |= {"ratio": round(statistics.median(ratios), 3), "quartiles": statistics.quantiles(ratios, n=4)[::2]}
        row["quartiles"] = [round(x, 3) for x in row["quartiles"]]
        print(f"{name:18} {row}", flush=True)
    return rows


WORK = {"minilm": of_minilm, "gpt2": of_gpt2}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(WORK), choices=WORK)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    environment = f"Python {platform.python_version()}, JAX {jax.__version__}, {os.cpu_count()} CPU cores"
    for model in arguments.models:
        rows = measured(WORK[model](), arguments.rounds)
        runs = json.loads(FILE.read_text()) if FILE.exists() else {}
        runs.setdefault(environment, {})[model] = rows
        FILE.write_text(json.dumps(runs, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

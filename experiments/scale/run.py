"""Llama-3-8B and 70B on 8 to 256 devices, compiled: python experiments/scale/run.py [--draw].

Writes results.json, and to chips.json how many chips of each kind hold a step of eight sequences. Each mesh is compiled
in a process of its own, for its number of virtual devices; no weights, no accelerator. What the files have is not
compiled again.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FILE, CHIPS = HERE / "results.json", HERE / "chips.json"
MODELS = ("llama-3-8b", "llama-3-70b")
DEVICES = (8, 16, 32, 64, 128, 256)
# The plans that the README states: 8B on one chip of 80 GB, 70B on eight.
STATED = [("llama-3-8b", {"fsdp": 1}, 4, "products"), ("llama-3-8b", {"fsdp": 1}, 4, "full")]
STATED += [("llama-3-70b", {"fsdp": 8}, 8, remat) for remat in ("products", "full")]


def cases():
    """Model, mesh, sequences, remat, and whether factors train or next to nothing does; 2,048 tokens a device."""
    for model, mesh, batch, remat in STATED:
        yield model, mesh, batch, remat, True
    for model in MODELS:
        for n in DEVICES:
            for mesh in ({"fsdp": n}, {"fsdp": n // 8, "tp": 8}):
                for adapted in (True, False):
                    yield model, mesh, n, "products", adapted


def name_of(model, mesh, batch, remat, adapted):
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.items())
    return f"{model}, {axes}, batch {batch}, remat {remat}, {'LoRA' if adapted else 'frozen'}"


def measured(model, mesh, batch, remat, adapted):
    from lora_jax.models.llama import Config
    from lora_jax.plan.plan import plan
    from lora_jax.plan.step import FROZEN, Job

    config = Config.from_huggingface(json.loads((HERE / f"{model}.json").read_text()))
    rules = {} if adapted else {"rules": FROZEN}
    return {"model": model, "adapted": adapted, **plan(Job(config, mesh, batch, remat=remat, **rules)).as_dict()}


def fewest(model, remat):
    """The fewest chips of each kind, by the command line."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, "-m", "lora_jax.cli", "plan", str(HERE / f"{model}.json"), "--batch", "8"]
        subprocess.run([*command, "--remat", remat, "--json", file.name], stdout=subprocess.DEVNULL, check=True)
        return json.load(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true", help="the table and the figure of results.json, and no more")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(*arguments.case)))
        return
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    for case in () if arguments.draw else (case for case in cases() if name_of(*case) not in rows):
        _, mesh, *_ = case
        devices = 1
        for size in mesh.values():
            devices *= size
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows[name_of(*case)] = json.loads(done.stdout)
        print(name_of(*case), f"{rows[name_of(*case)]['compile_seconds']} s", flush=True)
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
    chips = json.loads(CHIPS.read_text()) if CHIPS.exists() else {}
    for model, remat in itertools.product(MODELS, ("full", "products")):
        if not arguments.draw and f"{model}, remat {remat}" not in chips:
            chips[f"{model}, remat {remat}"] = fewest(model, remat)
            CHIPS.write_text(json.dumps(chips, indent=1) + "\n")
    import figure

    print(figure.tables())
    figure.draw(rows)


if __name__ == "__main__":
    main()

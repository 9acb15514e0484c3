"""What a step holds, as XLA plans it, with each recipe on top of the one before: python experiments/speed/memory.py."""

import argparse
import dataclasses
import functools
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from contenders import full, lora_jax
from models import MODELS, TARGETS, Task

from lora_jax.recipes import cross_entropy, save_products

FILE = Path(__file__).parent / "memory.json"
# Whether layers are scanned over, and what is done to each layer and to the loss.
RECIPES = {
    "none": (False, {}),
    "scan, checkpoint": (True, {"kept": jax.checkpoint}),
    "scan, checkpoint, cross_entropy": (True, {"kept": jax.checkpoint, "next_token": cross_entropy}),
    "scan, save_products, cross_entropy": (
        True,
        {"kept": functools.partial(jax.checkpoint, policy=save_products), "next_token": cross_entropy},
    ),
}


def held(model, targets, recipe):
    """Megabytes of a step of AdamW that donates its state: arguments, what is temporary, and both at the peak."""
    scanned, recipes = RECIPES[recipe]
    params, task = model.params(), Task.of(model, targets or "all_r16", **recipes)
    if scanned:
        params = params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])}
    step, state, frozen = (lora_jax if targets else full)(task, params)
    memory = jax.jit(step, donate_argnums=0).lower(state, frozen, task.batch).compile().memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {"arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes}
    return {name: round(size / 1e6) for name, size in {**sizes, "peak": sum(sizes.values()) + new}.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    model = dataclasses.replace(MODELS[arguments.model], batch=arguments.batch, length=arguments.length)
    rows = {}
    for recipe in RECIPES:
        rows[recipe] = {targets or "full": held(model, targets, recipe) for targets in (None, *TARGETS)}
        base = rows[recipe]["full"]["peak"]
        found = (f"{name} {row['peak']} MB ({row['peak'] / base:.3f})" for name, row in rows[recipe].items())
        print(f"{recipe:36}", *found, sep="  ", flush=True)
    shape = f"{arguments.model}, batch {arguments.batch} x {arguments.length}"
    FILE.write_text(json.dumps({"jax": jax.__version__, "shape": shape, "megabytes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

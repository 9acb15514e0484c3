"""What a step holds, as XLA plans it, with each recipe on top of the one before: python experiments/speed/memory.py."""

import argparse
import functools
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from contenders import ADAM, SCALE, trained
from models import plain, sized, targets_of

import lora_jax as lora
from lora_jax.recipes import cross_entropy, save_products

FILE = Path(__file__).parent / "memory.json"
KEPT = {"nothing": lambda layer: layer, "checkpoint": jax.checkpoint}
KEPT["save_products"] = functools.partial(jax.checkpoint, policy=save_products)
# Name: what is done to a layer, whether layers are scanned over, and whether the loss is chunked.
RECIPES = {
    "none": ("nothing", False, False),
    "scanned layers, each under jax.checkpoint": ("checkpoint", True, False),
    "and lora_jax.recipes.cross_entropy": ("checkpoint", True, True),
    "the same, but save_products": ("save_products", True, True),
}


def loss_of(model, kept, scanned, chunked):
    """The loss of next tokens, with the recipes."""
    layer = KEPT[kept](functools.partial(model.layer, plain))

    def loss(params, batch):
        x = params["embed"][batch] + params["positions"]
        if scanned:
            x = jax.lax.scan(lambda x, p: (layer(p, x), None), x, params["layers"])[0]
        else:
            for p in params["layers"]:
                x = layer(p, x)
        x, head, labels = model.normalized(params["norm"], x)[:, :-1], params["embed"].T, batch[:, 1:]
        if chunked:
            return cross_entropy(x, head, labels)
        logits = (x @ head).astype(jnp.float32)
        right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - right)

    return loss


def held(model, targets, recipe):
    """Peak and temporary bytes of a donated step of AdamW, without weights: nothing is computed."""
    kept, scanned, chunked = RECIPES[recipe]
    params = jax.eval_shape(model.params) if False else model.params()
    if scanned:
        params = params | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])}
    loss, batch = loss_of(model, kept, scanned, chunked), model.data()
    if targets is None:
        step, state, frozen = trained(lambda params, _, batch: loss(params, batch), params, None)
    else:
        names, rank = targets_of(model, targets)
        sites = lora.sites(loss, params, batch)
        rules = {rf"layers/(\d+/)?({'|'.join(names)})/kernel": lora.LoRA(rank, alpha=SCALE * rank)}
        frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)
        step, state, frozen = trained(
            lambda lp, frozen, batch: lora.lift(loss)(lora.attach(frozen, lp), batch),
            lora_params,
            frozen,
            lora.optimizer(ADAM),
        )
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    return {
        "arguments_mb": arguments / 1e6,
        "temp_mb": memory.temp_size_in_bytes / 1e6,
        "peak_mb": (arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
        / 1e6,
        "reported_peak_mb": memory.peak_memory_in_bytes / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    model = sized(arguments.model, batch=arguments.batch, length=arguments.length)
    rows = {}
    for recipe in RECIPES:
        found = {targets or "full": held(model, targets, recipe) for targets in (None, "qv_r8", "all_r16")}
        rows[recipe] = found
        full = found["full"]["peak_mb"]
        print(f"{recipe:42}", *(f"{name} {f['peak_mb']:.0f} MB ({f['peak_mb'] / full:.3f}; reported {f['reported_peak_mb']:.0f} temp {f['temp_mb']:.0f})" for name, f in found.items()), flush=True)
    FILE.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

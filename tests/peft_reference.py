"""What `fixtures/make_peft_reference.py` recorded, and PEFT's tensors as our factors: the one place that knows both."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_conv
import tiny_gpt2
import tiny_llama
from zoo import cross_entropy

import lora_jax as lora

FOLDER = Path(__file__).parent / "fixtures" / "peft"
RUNS = sorted(file.stem for file in FOLDER.glob("*-*.npz"))
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "conv": tiny_conv}


@functools.cache
def recorded(name: str) -> dict[str, Any]:
    """A file's arrays; those of a group are a dict from name to array."""
    with np.load(FOLDER / f"{name}.npz") as file:
        found = dict(file)
    for group, shapes in json.loads(str(found.pop("index"))).items():
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes.values()])
        *parts, rest = np.split(found[group], ends)
        assert not rest.size
        found[group] = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return found


@functools.cache
def model(name: str):
    """(logits and loss of parameters, parameters)."""
    module, file = MODELS[name], recorded(name)

    def result(params):
        if "images" in file:
            logits = module.logits(params, file["images"].transpose(0, 2, 3, 1))
            return logits, cross_entropy(logits, file["labels"])
        logits = module.logits(params, file["tokens"])
        return logits, cross_entropy(logits[:, :-1], file["tokens"][:, 1:])

    return result, jax.device_put(module.from_torch(file["weights"]))


def variant(run: str, config: dict[str, Any]) -> lora.Variant:
    """What PEFT was asked for, in our words."""
    if run in ("lora", "rslora"):
        scaling = "rank_stabilized" if config.get("use_rslora") else "standard"
        return lora.LoRA(rank=config["r"], alpha=config["lora_alpha"], scaling=scaling)
    raise ValueError(f"{run!r} is a run that no variant answers to: say here which does")


def inner(tensor, site):
    """(rank, in) as (in, rank); of a convolution (rank, in, height, width), flat perhaps, as (height, width, in, rank)."""
    if len(site.shape) == 2:
        return tensor.T
    height, width, inputs, _ = site.shape
    return tensor.reshape(-1, inputs, height, width).transpose(2, 3, 1, 0)


def outer(tensor, site):
    """(out, rank), of a convolution (out, rank, 1, 1), as (rank, out)."""
    return tensor.reshape(tensor.shape[:2]).T


# For each variant, its factors, and from which of PEFT's tensors each comes: the first of these names that there is.
FACTORS = {
    "LoRA": {
        "A": (inner, "lora_A.weight", "lora_embedding_A"),
        "B": (outer, "lora_B.weight", "lora_embedding_B"),
    },
}


def filled(adapter: lora.Adapter, path: str, tensors: dict[str, Any]) -> lora.Adapter:
    """The adapter of a leaf with PEFT's tensors, or with their gradients, which are taken out of the dict."""
    module, found = path.removesuffix(".weight"), {}
    for factor, (turn, *names) in FACTORS[type(adapter.variant).__name__].items():
        name = next(name for name in names if f"{module}.{name}" in tensors)
        value = np.ascontiguousarray(turn(tensors.pop(f"{module}.{name}"), adapter.site))
        assert value.shape == adapter.factors[factor].shape, (path, factor, value.shape)
        found[factor] = jax.device_put(value)
    return dataclasses.replace(adapter, factors={**adapter.factors, **found})

"""What `fixtures/make_peft_reference.py` recorded, and PEFT's tensors as our factors: the one place that knows both."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
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


def rules(run: str, config: dict[str, Any]) -> dict[str, lora.Variant]:
    """What PEFT was asked for, in our words; `feedforward_modules` are those whose inputs IA³ scales."""
    inputs = config.get("feedforward_modules", [])
    outputs = [target for target in config["target_modules"] if target not in inputs]

    def pattern(targets):
        return rf"(.*\.)?({'|'.join(map(re.escape, targets))})\.weight"

    sides = {"in": inputs, "out": outputs}
    return {pattern(targets): _variant(run, config, side) for side, targets in sides.items() if targets}


def _variant(run: str, config: dict[str, Any], side: str) -> lora.Variant:
    rank, alpha = config.get("r"), config.get("alpha", config.get("lora_alpha"))
    match run.split("-"):
        case ["lora" | "rslora" | "pissa" | "olora"]:
            scaling = "rank_stabilized" if config.get("use_rslora") else "standard"
            return lora.LoRA(rank=rank, alpha=alpha, scaling=scaling, init=config.get("init_lora_weights", "uniform"))
        case ["dora"]:
            return lora.DoRA(rank=rank, alpha=alpha)
        case ["vera"]:
            return lora.VeRA(rank=rank)
        case ["loha"]:
            return lora.LoHa(rank=rank, alpha=alpha)
        case ["lokr", *_]:
            return lora.LoKr(rank=rank, alpha=alpha, decompose_both=config.get("decompose_both", False))
        case ["ia3"]:
            return lora.IA3(side)
        case ["adalora", *_]:
            rank = config["init_r"]
            return lora.AdaLoRA(rank=rank, alpha=alpha * rank / (rank + 1e-5))  # PEFT divides by the latter
    raise ValueError(f"{run!r} is a run that no variant answers to: say here which does")


def inner(tensor, site):
    """(rank, in) as (in, rank); of a convolution (rank, in, height, width), or flat, as (height, width, in, rank)."""
    if len(site.shape) == 2:
        return tensor.T
    height, width, inputs, _ = site.shape
    return tensor.reshape(-1, inputs, height, width).transpose(2, 3, 1, 0)


def windowed(tensor, site):
    """(out, in) as (in, out); of a convolution (out, in, height, width), or flat, as (height, width, in, out)."""
    window = [site.shape[d] for d in site.window_axes]
    tensor = tensor.reshape(len(tensor), -1, *window)
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def outer(tensor, site):
    """(out, rank), of a convolution (out, rank, 1, 1), as (rank, out)."""
    return tensor.reshape(tensor.shape[:2]).T


def flat(tensor, site):
    return tensor.ravel()


def turned(tensor, site):
    return tensor.T


LORA = {"A": (inner, "lora_A.weight", "lora_embedding_A"), "B": (outer, "lora_B.weight", "lora_embedding_B")}
# For each variant, its factors, and from which of PEFT's tensors each comes: the first of these names that there is.
FACTORS = {
    "LoRA": LORA,
    "DoRA": {**LORA, "magnitude": (flat, "lora_magnitude_vector.weight", "lora_magnitude_vector")},
    "VeRA": {
        "d": (flat, "vera_lambda_d"),
        "b": (flat, "vera_lambda_b"),
        "A": (turned, "vera_A"),
        "B": (turned, "vera_B"),
    },
    "LoHa": {
        "A1": (inner, "hada_w1_b"),
        "B1": (outer, "hada_w1_a"),
        "A2": (inner, "hada_w2_b"),
        "B2": (outer, "hada_w2_a"),
    },
    "LoKr": {
        "C": (turned, "lokr_w1"),
        "C1": (turned, "lokr_w1_b"),
        "C2": (turned, "lokr_w1_a"),
        "A": (windowed, "lokr_w2_b"),
        "B": (turned, "lokr_w2_a"),
        "AB": (windowed, "lokr_w2"),
    },
    "AdaLoRA": {"A": (inner, "lora_A"), "E": (flat, "lora_E"), "B": (outer, "lora_B")},
    "IA3": {"scale": (flat, "ia3_l")},
}


def filled(adapter: lora.Adapter, path: str, tensors: dict[str, Any]) -> lora.Adapter:
    """The adapter of a leaf with PEFT's tensors, or with their gradients, which are taken out of the dict."""
    prefix = "" if path.startswith("shared/") else path.removesuffix("weight")
    found = {}
    for factor, x in adapter.factors.items():
        turn, *names = FACTORS[type(adapter.variant).__name__][factor]
        name = next(prefix + name for name in names if prefix + name in tensors)
        value = np.ascontiguousarray(turn(tensors.pop(name), adapter.site))
        assert value.shape == x.shape, (path, factor, value.shape, x.shape)
        found[factor] = jax.device_put(value)
    return dataclasses.replace(adapter, factors=found)

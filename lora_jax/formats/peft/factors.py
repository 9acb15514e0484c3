"""Factors: which of PEFT's tensors each factor of a variant is, and how it lies there."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.axes import Axes, Axis
from lora_jax.formats.layouts import BARE, Groups
from lora_jax.formats.names import Place
from lora_jax.sites import Site
from lora_jax.variants import IA3, AdaLoRA, DoRA, LoHa, LoKr, LoRA, LoRAFA, VeRA
from lora_jax.variants.base import RANK, Variant

OTHER = "other rank"
Table = Mapping[str, tuple[str, str]]

# For each factor, PEFT's suffix of the module's name and the tensor's dimensions, in terms of the layout's; "window" is
# as many as a window has, and "ones" as many of size 1. A dimension of several in parentheses is their product.
FACTORS: Table = {"A": ("lora_A.weight", "(expert rank) in window"), "B": ("lora_B.weight", "out (rank expert) ones")}
EMBEDDING: Table = {"A": ("lora_embedding_A", "rank in"), "B": ("lora_embedding_B", "out rank")}
# The linear layer that an embedding is tied to has the same factors, turned: its inputs are the embedding's outputs.
TIED: Table = {"A": ("lora_B.weight", "in rank"), "B": ("lora_A.weight", "rank out")}
MAGNITUDE = "lora_magnitude_vector"
LORA_BIAS = ".lora_B.bias"
TABLES: Mapping[type[Variant], Table] = {
    LoRA: FACTORS,
    LoRAFA: FACTORS,
    DoRA: FACTORS,
    VeRA: {"d": ("vera_lambda_d", "rank"), "b": ("vera_lambda_b", "out")},
    AdaLoRA: {"A": ("lora_A", "rank (in window)"), "E": ("lora_E", "rank one"), "B": ("lora_B", "out rank")},
    IA3: {"scale": ("ia3_l", "out one")},
    LoHa: {
        "A1": ("hada_w1_b", "rank (in window)"),
        "B1": ("hada_w1_a", "out rank"),
        "A2": ("hada_w2_b", "other (in window)"),
        "B2": ("hada_w2_a", "out other"),
    },
    LoKr: {
        "C": ("lokr_w1", "out in"),
        "C1": ("lokr_w1_b", "other in"),
        "C2": ("lokr_w1_a", "out other"),
        "A": ("lokr_w2_b", "rank (in window)"),
        "B": ("lokr_w2_a", "out rank"),
        "AB": ("lokr_w2", "out in window"),
    },
}
# PEFT's name of each variant, and the kinds of modules that it has it for.
MATRICES = ("linear", "conv1d")
TYPES: Mapping[type[Variant], tuple[str, tuple[str, ...]]] = {
    LoRA: ("LORA", (*MATRICES, "conv", "embedding", *BARE)),
    LoRAFA: ("LORA", (*MATRICES, "conv", "embedding", *BARE)),
    DoRA: ("LORA", (*MATRICES, "conv", "embedding")),
    VeRA: ("VERA", MATRICES),
    AdaLoRA: ("ADALORA", (*MATRICES, "conv")),
    IA3: ("IA3", (*MATRICES, "conv")),
    LoHa: ("LOHA", ("linear", "conv")),
    LoKr: ("LOKR", ("linear", "conv")),
}


class Form(NamedTuple):
    """One of PEFT's tensors.

    Attributes:
      suffix: The end of its name, after the module's.
      words: What each of its dimensions is, before those in parentheses are made one.
      groups: The axes of ours that each of these is the product of.
      merged: How many of these each dimension in the file is made of.
    """

    suffix: str
    words: tuple[str, ...]
    groups: Groups
    merged: tuple[int, ...]


def forms(variant: Variant, site: Site, place: Place, tied: bool = False) -> dict[str, Form]:
    """PEFT's tensor for each factor that a leaf has.

    Args:
      variant: The leaf's variant.
      site: The leaf's site.
      place: Where it is in their modules.
      tied: Whether it is for the module that an embedding is tied to.

    Raises:
      ValueError: PEFT has no such variant, or not for such a module.
    """
    kind = place.layout.kind
    if type(variant) not in TABLES:
        raise ValueError(
            f"PEFT has no {type(variant).__name__}: `merge` it into the weights, or make it a LoRA with `extract`"
        )
    name, kinds = TYPES[type(variant)]
    if kind not in kinds or (tied and type(variant) not in (LoRA, LoRAFA)):
        what = "embedding that is also the head" if tied else kind
        raise ValueError(f"PEFT's {name} has no {type(variant).__name__} of a module of kind {what}: `merge` it")
    table = TIED if tied else EMBEDDING if kind == "embedding" else TABLES[type(variant)]
    if isinstance(variant, DoRA):
        table = {**table, "magnitude": (MAGNITUDE, "one out ones" if kind == "conv" else "out")}
    if isinstance(variant, IA3) and (kind == "conv" or variant.side == "in"):
        table = {"scale": ("ia3_l", "one in" if variant.side == "in" else "one out ones")}
    own = axes(variant, site, place)
    return {factor: _form(*table[factor], own[factor], place) for factor in table if factor in own}


def axes(variant: Variant, site: Site, place: Place) -> dict[str, dict[str, int]]:
    """The axes of each factor, by name, with their sizes: the leaf's, or halves of them such as `in.0`, and ranks."""

    def name(axis: str) -> str:
        number, dot, half = axis.partition(".")
        return f"{place.axes[int(number)]}{dot}{half}" if number.isdigit() else axis

    found = _axes(variant, dataclasses.replace(site, uses=()))
    return {factor: {name(axis.name): axis.size for axis in own} for factor, own in found.items()}


def merged(shape: Iterable[int], form: Form) -> tuple[int, ...]:
    """The shape in a file, from that with products apart."""
    rest = iter(shape)
    return tuple(math.prod(next(rest) for _ in range(number)) for number in form.merged)


@functools.cache
def _axes(variant: Any, site: Site) -> dict[str, Axes]:
    """As `Variant.axes`; of any rank, where PEFT has them above what `split` gives a leaf."""
    if isinstance(variant, LoKr) or getattr(variant, "rank", 0) <= site.max_rank:
        return variant.axes(site)
    found = dataclasses.replace(variant, rank=1).axes(site)
    ranks = (RANK, OTHER)
    return {
        factor: tuple(Axis(axis.name, variant.rank) if axis.name in ranks else axis for axis in own)
        for factor, own in found.items()
    }


def _form(suffix: str, dimensions: str, own: Iterable[str], place: Place) -> Form:
    layout, window = place.layout, place.layout.side("w")
    sides = {"in": layout.side("i"), "out": layout.side("o"), "expert": layout.side("b") or ((),), "window": window}
    sides |= {"rank": ((RANK,),), "other": ((OTHER,),), "one": ((),), "ones": ((),) * len(window)}
    words, groups, numbers = [], [], []
    for several, single in re.findall(r"\(([^)]*)\)|(\w+)", dimensions):
        parts = [(word, group) for word in (several or single).split() for group in sides[word]]
        words += [word for word, _ in parts]
        # Of an axis that a variant splits, a factor has a half; an axis that it does not have is none of its own.
        groups += [
            tuple(axis for root in group for axis in own if axis.partition(".")[0] == root) for _, group in parts
        ]
        numbers += [len(parts)] if several else [1] * len(parts)
    return Form(suffix, tuple(words), tuple(groups), tuple(numbers))

"""Factors: which of PEFT's tensors each factor is, and how it lies there."""

from __future__ import annotations

from typing import NamedTuple

from lora_jax.formats.names import Groups, Place
from lora_jax.variants.base import RANK, Variant

# For each variant, its factors: PEFT's suffix of the module's name, and the tensor's dimensions.
LORA = {"A": ("lora_A.weight", "rank in"), "B": ("lora_B.weight", "out rank 1")}
EMBEDDING = {"A": ("lora_embedding_A", "rank in"), "B": ("lora_embedding_B", "out rank")}
MAGNITUDE = {"magnitude": ("lora_magnitude_vector", "out")}


class Form(NamedTuple):
    """A tensor of PEFT's that is a factor: the end of its name, after the module's, and its dimensions."""

    suffix: str
    groups: Groups


def forms(variant: Variant, place: Place) -> dict[str, Form]:
    """PEFT's tensor for each factor of a leaf."""
    table = EMBEDDING if place.layout.kind == "embedding" else LORA
    if "magnitude" in variant.labels():
        table = {**table, **MAGNITUDE}
    words = _dimensions(place)
    return {
        factor: Form(suffix, tuple(group for word in dims.split() for group in words[word]))
        for factor, (suffix, dims) in table.items()
    }


def axes(variant: Variant, place: Place) -> dict[str, tuple[str, ...]]:
    """The names of each factor's axes: the leaf's own, and the rank."""
    found = variant.axes(place.site())
    return {
        factor: tuple(axis.name if axis.name == RANK else place.axes[int(axis.name)] for axis in own)
        for factor, own in found.items()
    }


def _dimensions(place: Place) -> dict[str, Groups]:
    window, rank = place.layout.side("w"), ((RANK,),)
    return {
        "rank": rank,
        "in": place.layout.side("i") + window,
        "out": place.layout.side("o"),
        "1": ((),) * len(window),
    }

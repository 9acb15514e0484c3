"""Factors lie as their leaves do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora

STACKED = {"w": (3, 64, 8, 16)}
VARIANTS = {
    "LoRA": (lora.LoRA(4), {"A": P("l", "f", None), "B": P("l", None, "t", None)}),
    "DoRA": (lora.DoRA(4), {"A": P("l", "f", None), "B": P("l", None, "t", None), "magnitude": P("l", "t", None)}),
    "LoRAXS": (lora.LoRAXS(4), {"A": P("l", "f", None), "R": P("l", None, None), "B": P("l", None, "t", None)}),
    "AdaLoRA": (lora.AdaLoRA(4), {"A": P("l", "f", None), "E": P("l", None), "B": P("l", None, "t", None)}),
    "IA3": (lora.IA3(), {"scale": P("l", "t", None)}),
    "VeRA": (lora.VeRA(4), {"d": P("l", None), "b": P("l", "t", None)}),
    "Full": (lora.Full(), {"weight": P("l", "f", "t", None)}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_factors_lie_along_the_axes_of_their_leaf(name):
    variant, expected = VARIANTS[name]
    placed = variant.at(batch_axes=0, in_axes=1, out_axes=(2, 3))
    shapes = jax.eval_shape(
        lambda: lora.split(jax.random.key(0), jax.tree.map(jnp.zeros, STACKED, is_leaf=is_shape), {"w": placed})[1]
    )
    assert lora.partition_specs(shapes, {"w": P("l", "f", "t")})["w"].factors == expected


def is_shape(node):
    return isinstance(node, tuple)

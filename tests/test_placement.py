"""Factors are made where their leaves lie, however they begin; what cannot is an error."""

from __future__ import annotations

import jax
import pytest
from checks import error, normal, randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_laws import VARIANTS

import lora_jax as lora

MESH = jax.make_mesh((2, 4), ("f", "t"), axis_types=(AxisType.Auto,) * 2)
PARAMS = {"kernel": normal(16, 8, seed=1), "heads": normal(2, 16, 4, 6, seed=2)}
SPECS = {"kernel": P("f", "t"), "heads": P(None, "f", "t")}
PLACED = jax.device_put(PARAMS, {path: NamedSharding(MESH, spec) for path, spec in SPECS.items()})


def rules(variant):
    return {"kernel": variant, "heads": variant.at(batch_axes=0, in_axes=1, out_axes=(2, 3))}


BEGINNINGS = {init: lora.LoRA(rank=2, init=init) for init in ("orthogonal", "pissa", "olora")}


@pytest.mark.parametrize("name", [*VARIANTS, *BEGINNINGS])
def test_on_a_mesh_it_begins_as_on_one_device(name):
    variant = {**VARIANTS, **BEGINNINGS}[name]
    frozen, lora_params = lora.split(jax.random.key(0), PLACED, rules(variant))
    expected = lora.split(jax.random.key(0), PARAMS, rules(variant))
    assert error((frozen, lora_params), expected) < 1e-6
    lie(lora_params, lora.shardings(lora_params, PLACED))
    if name in VARIANTS:
        assert all(frozen[path] is PLACED[path] for path in PLACED)
    lora_params = randomized(lora_params)
    merged = lora.merge(frozen, lora_params)
    lie(merged, {path: leaf.sharding for path, leaf in PLACED.items()})
    assert error(merged, lora.merge(expected[0], randomized(expected[1]))) < 1e-6


def lie(arrays, shardings):
    """Each array lies as its sharding says, on the mesh and not on one of its devices."""
    for array, sharding in zip(jax.tree.leaves(arrays), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim), (array.shape, array.sharding, sharding)

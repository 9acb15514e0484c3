"""Factors lie as their leaves do, and training on any mesh is training on one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

pytestmark = pytest.mark.standard_promotion

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


PARAMS = {"up": normal(16, 32, seed=1, scale=0.25), "down": normal(32, 16, seed=2, scale=0.2)}
X, Y = normal(16, 16, seed=3), normal(16, 16, seed=4)
# name: the mesh, the specs of the weights and that of the batch
MESHES = {
    "data 8": ({"data": 8}, {"up": P(), "down": P()}, P("data")),
    "fsdp 8": ({"fsdp": 8}, {"up": P("fsdp"), "down": P("fsdp")}, P("fsdp")),
    "tp 8": ({"tp": 8}, {"up": P(None, "tp"), "down": P("tp")}, P()),
    "fsdp 4, tp 2": ({"fsdp": 4, "tp": 2}, {"up": P("fsdp", "tp"), "down": P("tp", "fsdp")}, P("fsdp")),
    "data 2, fsdp 2, tp 2": (
        {"data": 2, "fsdp": 2, "tp": 2},
        {"up": P("fsdp", "tp"), "down": P("tp", "fsdp")},
        P(("data", "fsdp")),
    ),
}


def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


def trained(frozen, lora_params, x, y):
    """On a mesh what comes out of a step lies as what goes in: the compiler is free to choose, unless told."""
    tx = lora.optimizer(optax.adam(1e-2))
    carried = None, None
    if isinstance(frozen["up"].sharding, NamedSharding):
        carried = lora.shardings((lora_params, jax.eval_shape(tx.init, lora_params)), frozen)

    @functools.partial(jax.jit, out_shardings=(*carried, None))
    def step(lora_params, state, frozen, x, y):
        value, grads = jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(frozen, lp), x, y))(lora_params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(lora_params, updates), state, value

    state, losses = tx.init(lora_params), []
    for _ in range(20):
        lora_params, state, value = step(lora_params, state, frozen, x, y)
        losses.append(float(value))
    return np.array(losses), lora_params, state


@functools.cache
def begun(variant):
    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, {".*": variant})
    return frozen, lora_params, trained(frozen, lora_params, X, Y)[0]


@pytest.mark.parametrize("variant", [lora.LoRA(4), lora.DoRA(4)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", MESHES)
def test_training_on_a_mesh_is_training_on_one_device(name, variant):
    sizes, base, batch = MESHES[name]
    frozen, lora_params, expected = begun(variant)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    frozen = {path: jax.device_put(x, NamedSharding(mesh, base[path])) for path, x in frozen.items()}
    lora_params = jax.device_put(lora_params, lora.shardings(lora_params, frozen))
    x, y = (jax.device_put(array, NamedSharding(mesh, batch)) for array in (X, Y))
    losses, after, state = trained(frozen, lora_params, x, y)
    assert max(abs(losses - expected)) < 1e-5
    assert expected[-1] < 0.9 * expected[0]
    wanted = lora.shardings(lora_params, frozen)
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), after, wanted)
    assert all(jax.tree.leaves(same))

"""A Factored value as an array, formed because somebody asked for it, and what that costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.axes import Axes
from lora_jax.contract import contract, reshape
from lora_jax.explicit import sharded_alike
from lora_jax.factored import Factored
from lora_jax.network import Network
from lora_jax.order import Cost, letters, work


def materialize(value: Factored, sharding: NamedSharding | None = None) -> jax.Array:
    """The whole weight W + ΔW, formed in the wider of the base's and the factors' dtypes and rounded once.

    Args:
      value: A Factored value of any shape.
      sharding: Where the result is to lie on a mesh; None for where the compiler puts it.

    Returns:
      An array of `value.shape` and `value.dtype`.
    """
    array = _forming(sharding)(dataclasses.replace(value, paths=()))
    return jax.block_until_ready(array) if sharding else array


@functools.cache
def _forming(sharding: NamedSharding | None) -> Callable[[Factored], jax.Array]:
    """Jitted, so that it is compiled once for all leaves of a form, and holds no temporary that it need not."""

    def array(value: Factored) -> jax.Array:
        dtypes = {jnp.dtype("float32"), value.dtype, *(x.dtype for delta in value.deltas for x in delta.operands)}
        wide = max(dtypes, key=lambda dtype: dtype.itemsize) if value.deltas else value.dtype
        return sharded_alike(lambda value: total(value, wide, lax.Precision.HIGHEST), value)

    return jax.jit(array, out_shardings=sharding)


def total(value: Factored, dtype: Any = None, precision: Any = None) -> jax.Array:
    """The sum of the value's networks: an array of its own dtype, computed in `dtype`, or else in that too."""
    if not value.terms:
        return jnp.zeros(value.shape, value.dtype)
    wide = dtype or value.dtype

    def product(term: Network) -> jax.Array:
        (first, axes), *rest = term.at(dtype)
        operands = [(first.astype(wide), axes), *rest]
        return contract(operands, value.axes, frozen=term.frozen, dtype=wide, precision=precision).astype(wide)

    return reshape(functools.reduce(jnp.add, map(product, value.terms)).astype(value.dtype), value.shape)


def cost_of(value: Factored, rows: Axes = ()) -> Cost:
    """What `total` costs; operands over `rows`, which were looked up, are written as A[i]."""

    def names(delta: Network) -> tuple[str, ...]:
        looked_up = ("[i]" if {*rows} & {*axes} else "" for axes in delta.axes)
        return tuple(letter + index for letter, index in zip(letters(len(delta.axes)), looked_up, strict=True))

    pairs = [work(delta.axes, value.axes, names(delta), frozen=delta.frozen) for delta in value.deltas]
    return Cost(0, sum(flops for flops, _ in pairs), " + ".join(word for _, word in pairs))

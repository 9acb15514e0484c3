"""Slices of leaves: one layer of a stacked leaf is set or taken where it lies, on one device or on a mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.placement import names_of

Dims = tuple[int, ...]


def place(x: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """An array of the host's on the devices of a sharding, each of which gets its part alone; None: the default one."""
    if sharding is None:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put(
    stack: jax.Array | None, x: np.ndarray, dims: Dims, index: Dims, shape: Dims, sharding: Sharding | None
) -> jax.Array:
    """A leaf with x at an index along some of its dimensions, in the leaf's own memory, which may not be used again.

    Args:
      stack: The leaf; None begins it with zeros.
      x: The entry, without those dimensions.
      dims: The dimensions, in ascending order.
      index: One number for each.
      shape: The leaf's.
      sharding: The leaf's; None for the default device.
    """
    if not dims:
        return place(x, sharding)
    if stack is None:
        stack = jax.jit(functools.partial(jnp.zeros, shape, x.dtype), out_shardings=sharding)()
    part = sharding
    if isinstance(sharding, NamedSharding):
        part = NamedSharding(sharding.mesh, _without(_spec(sharding, shape), dims))
    known = sharding if isinstance(sharding, NamedSharding) else None
    return _put(stack, place(x, part), np.asarray(index, np.int32), dims=dims, sharding=known)


def take(leaf: Any, dims: Dims, index: Dims) -> np.ndarray:
    """The entry of a leaf at an index along some of its dimensions, on the host; nothing of it stays there."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[tuple(index[dims.index(d)] if d in dims else slice(None) for d in range(leaf.ndim))]
    if not dims:
        return np.asarray(
            jnp.copy(leaf)
        )  # an array of several devices, or of another than the CPU, keeps what NumPy saw
    known = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    return np.asarray(_take(leaf, np.asarray(index, np.int32), dims=dims, sharding=known))


@functools.partial(jax.jit, static_argnames=("dims", "sharding"), donate_argnums=0)
def _put(stack: jax.Array, x: jax.Array, index: jax.Array, dims: Dims, sharding: NamedSharding | None) -> jax.Array:
    def local(stack: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        starts, inside = _starts(stack, index, dims, spec)
        x = jnp.expand_dims(x, dims)
        if inside is not None:
            x = jnp.where(inside, x, lax.dynamic_slice(stack, starts, x.shape))
        return lax.dynamic_update_slice(stack, x, starts)

    if sharding is None:
        spec = ()
        return local(stack, x, index)
    spec = _spec(sharding, stack.shape)
    specs = spec, _without(spec, dims), PartitionSpec()
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=spec)(stack, x, index)


@functools.partial(jax.jit, static_argnames=("dims", "sharding"))
def _take(stack: jax.Array, index: jax.Array, dims: Dims, sharding: NamedSharding | None) -> jax.Array:
    def local(stack: jax.Array, index: jax.Array) -> jax.Array:
        starts, inside = _starts(stack, index, dims, spec)
        sizes = [1 if d in dims else size for d, size in enumerate(stack.shape)]
        x = lax.dynamic_slice(stack, starts, sizes).squeeze(dims)
        if inside is None:
            return x
        bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")  # of which a sum with zeros changes none
        names = tuple(name for d in dims for name in names_of(spec[d]))
        return lax.bitcast_convert_type(lax.psum(jnp.where(inside, bits, 0), names), x.dtype)

    if sharding is None:
        spec = ()
        return local(stack, index)
    spec = _spec(sharding, stack.shape)
    specs = spec, PartitionSpec()
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=_without(spec, dims))(stack, index)


def _starts(stack: jax.Array, index: jax.Array, dims: Dims, spec: Any) -> tuple[list[Any], Any]:
    """Where an entry begins in a device's part, and whether it is in it; None where all have it."""
    starts: list[Any] = [jnp.int32(0)] * stack.ndim
    inside = None
    for number, d in enumerate(dims):
        starts[d] = index[number]
        if spec and names_of(spec[d]):
            starts[d] -= lax.axis_index(names_of(spec[d])) * stack.shape[d]
            here = (starts[d] >= 0) & (starts[d] < stack.shape[d])
            inside = here if inside is None else inside & here
    return starts, inside


def _spec(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec, with an entry for each dimension."""
    return PartitionSpec(*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))


def _without(spec: PartitionSpec, dims: Dims) -> PartitionSpec:
    return PartitionSpec(*(entry for d, entry in enumerate(spec) if d not in dims))

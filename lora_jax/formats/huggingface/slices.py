"""Slices of leaves: one layer of a stacked leaf is set or taken where it lies, on one device or on a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.placement import names_of

Dims = tuple[int, ...]


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Memory that JAX on a CPU takes over as it is, since it begins where XLA wants it to: no copy is made."""
    size, boundary = math.prod(shape) * dtype.itemsize, 64
    memory = np.empty(size + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + size].view(dtype).reshape(shape)


def place(x: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """An array of the host's on the devices of a sharding, each of which gets its part alone; None: the default one."""
    if sharding is None:
        return jax.device_put(x)
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
        part = NamedSharding(sharding.mesh, _without(_whole(sharding, shape), dims))
    return _putter(dims, sharding)(stack, place(x, part), np.asarray(index, np.int32))


def take(leaf: Any, dims: Dims, index: Dims) -> np.ndarray:
    """The entry of a leaf at an index along some of its dimensions, on the host; nothing else of it comes there."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[tuple(index[dims.index(d)] if d in dims else slice(None) for d in range(np.ndim(leaf)))]
    entry = np.empty([size for d, size in enumerate(leaf.shape) if d not in dims], leaf.dtype)
    for shard in leaf.addressable_shards:
        own = tuple(i - (shard.index[d].start or 0) for d, i in zip(dims, index, strict=True))
        if shard.replica_id or not all(0 <= i < shard.data.shape[d] for d, i in zip(dims, own, strict=True)):
            continue
        if shard.device.platform == "cpu":  # where NumPy sees an array as it lies
            part = take(np.asarray(shard.data), dims, own)
        else:  # where an array keeps what NumPy has seen of it, as this one does as long as it lives
            part = np.asarray(_copied(shard.data, own, dims))
        if part.shape == entry.shape:
            return part
        entry[tuple(span for d, span in enumerate(shard.index) if d not in dims)] = part
    return entry


@functools.lru_cache(maxsize=256)
def _putter(dims: Dims, sharding: Sharding | None) -> Callable[..., jax.Array]:
    """What sets entries; on a mesh each device does what concerns its part, so that nothing is sent."""

    def put(stack: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        def local(stack: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
            starts, inside = _starts(stack, index, dims, spec)
            x = jnp.expand_dims(x, dims)
            if inside is not None:
                x = jnp.where(inside, x, lax.dynamic_slice(stack, starts, x.shape))
            return lax.dynamic_update_slice(stack, x, starts)

        if not isinstance(sharding, NamedSharding):
            spec = None
            return local(stack, x, index)
        spec = _whole(sharding, stack.shape)
        specs = spec, _without(spec, dims), PartitionSpec()
        return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=spec)(stack, x, index)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)


@functools.partial(jax.jit, static_argnames="dims")
def _copied(x: jax.Array, index: Any, dims: Dims) -> jax.Array:
    starts = [index[dims.index(d)] if d in dims else 0 for d in range(x.ndim)]
    sizes = [1 if d in dims else size for d, size in enumerate(x.shape)]
    return lax.dynamic_slice(x, starts, sizes).squeeze(dims) if dims else jnp.copy(x)


def _starts(stack: jax.Array, index: jax.Array, dims: Dims, spec: PartitionSpec | None) -> tuple[list[Any], Any]:
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


def _whole(sharding: NamedSharding, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec, with an entry for each dimension."""
    return PartitionSpec(*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))


def _without(spec: PartitionSpec, dims: Dims) -> PartitionSpec:
    return PartitionSpec(*(entry for d, entry in enumerate(spec) if d not in dims))

"""Every device of every process works on a part of the batch; one device does what it does without this file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.placement import on_mesh


def parallel(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit(fun)`, which spreads its last argument over all devices; results are whole on each of them."""
    jitted = jax.jit(fun, out_shardings=whole())
    return lambda *args: jitted(*args[:-1], spread(args[-1]))


def whole() -> NamedSharding | None:
    """Where that lies which each device has all of; None for one device."""
    return None if jax.device_count() == 1 else NamedSharding(_mesh(1), PartitionSpec())


def everywhere(tree: Any) -> Any:
    """The tree's arrays, whole on each device; those that lie on several already stay."""
    sharding = whole()
    return tree if sharding is None else jax.tree.map(lambda x: _placed(x, sharding), tree)


def spread(batch: Any) -> Any:
    """The batch's arrays, which have examples along their first axis, in as many parts as devices and examples allow.

    Each process has the whole batch, and puts on its devices what belongs there; arrays that lie there already stay.
    """
    if jax.device_count() == 1:
        return batch
    examples = len(jax.tree.leaves(batch)[0])
    parts = math.gcd(examples, jax.device_count())
    return jax.tree.map(lambda x: _placed(x, NamedSharding(_mesh(parts), PartitionSpec("data"))), batch)


def _mesh(parts: int) -> Mesh:
    """All devices, as so many groups that have the same."""
    return Mesh(np.reshape(jax.devices(), (parts, -1)), ("data", "same"))


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    if on_mesh(array):
        return array
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

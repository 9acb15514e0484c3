"""Explicit mesh axes: what is computed here runs under automatic ones, and its results get the types of the user's.

With explicit axes an array's type says how it is sharded, and JAX refuses an operation whose result could be sharded in
several ways, unless it is told, as by `out_sharding=`. The user's function tells what its own results are to be. What
takes their place here, such as x·A with x split along the axis that is summed over, is left to the compiler, as it is
under automatic axes; so explicit axes cost what automatic ones do. Where no axis is explicit nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import compat
from lora_jax.axes import Axes
from lora_jax.factored import Factored, is_factored
from lora_jax.shards import own_spec, shards_of, spec_of


def under_automatic_axes(fun: Callable[..., Any], *operands: Any, out: Any) -> Any:
    """`fun(*operands)`, computed under automatic axes if those of some operand are explicit.

    Args:
      fun: Any function.
      *operands: Any pytrees.
      out: How what `fun` returns is to be sharded, unless it is None or NotImplemented: like its result, a
        `NamedSharding` for each array and for each Factored value. One without a mesh stands for a whole array.
    """
    mesh = compat.explicit_mesh(operands)
    if mesh is None:
        return fun(*operands)
    with compat.automatic_axes(mesh) as automatic:
        result = fun(*jax.tree.map(lambda x: _moved(x, automatic), operands))
    if result is None or result is NotImplemented:
        return result
    unsplit = NamedSharding(mesh, PartitionSpec())

    def returned(value: Any, sharding: NamedSharding) -> Any:
        return value if value is None else typed(value, unsplit if sharding.mesh.empty else sharding)

    return jax.tree.map(returned, result, out, is_leaf=lambda x: x is None or is_factored(x))


def _moved(array: Any, mesh: Any) -> Any:
    explicit = compat.explicit_mesh(array) is not None
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec())) if explicit else array


def typed(value: Any, sharding: NamedSharding) -> Any:
    """An array or a Factored value with the type of that sharding, as operands have it along the axes they share."""
    if not is_factored(value):
        return jax.sharding.reshard(value, sharding)
    mesh, shards = sharding.mesh, shards_of(value, sharding.spec, sharding.mesh) or {}

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        return jax.sharding.reshard(array, NamedSharding(mesh, spec_of(axes, shards))), axes

    return value.map(change)


def whole(array: jax.Array) -> jax.Array:
    """An array that no explicit axis splits: what JAX decomposes, it wants whole by its type."""
    mesh = compat.explicit_mesh(array)
    return array if mesh is None else jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec()))


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding that an array's type says; None where no axis is explicit."""
    return None if compat.explicit_mesh(array) is None else jax.typeof(array).sharding


def sharded_alike(fun: Callable[..., Any], value: Factored, *others: Any) -> Any:
    """`fun(value, *others)`, computed under automatic axes, which is then sharded as the value is."""
    mesh = compat.explicit_mesh((value, others))
    return under_automatic_axes(fun, value, *others, out=mesh and NamedSharding(mesh, own_spec(value)))


def stand_in(value: Factored) -> Any:
    """`value.stand_in` with the type of the value, if axes are explicit."""
    mesh = compat.explicit_mesh(value)
    if mesh is None:
        return value.stand_in
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, own_spec(value)))

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
      out: How what `fun` returns is to be sharded, if it is not None: like its result, a `NamedSharding` for each array
        and for each Factored value.
    """
    mesh = compat.explicit_mesh(operands)
    if mesh is None:
        return fun(*operands)
    with compat.automatic_axes(mesh) as automatic:
        result = fun(*jax.tree.map(lambda x: _moved(x, automatic), operands))
    return jax.tree.map(typed, result, out, is_leaf=lambda x: x is None or is_factored(x))


def _moved(array: Any, mesh: Any) -> Any:
    explicit = compat.explicit_mesh(array) is not None
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec())) if explicit else array


def typed(value: Any, sharding: Any) -> Any:
    """An array or a Factored value with the type of that sharding, as operands have it along the axes they share."""
    if value is None or not isinstance(sharding, NamedSharding):
        return value
    if not is_factored(value):
        return jax.sharding.reshard(value, sharding)
    mesh, shards = sharding.mesh, shards_of(value, sharding.spec, sharding.mesh) or {}

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        return jax.sharding.reshard(array, NamedSharding(mesh, spec_of(axes, shards))), axes

    return value.map(change)


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding that an array's type says; None where no axis is explicit."""
    return None if compat.explicit_mesh(array) is None else jax.typeof(array).sharding


def sharded_alike(fun: Callable[..., Any], value: Factored, *others: Any) -> Any:
    """`fun(value, *others)`, computed under automatic axes, which is then sharded as the value is."""
    return under_automatic_axes(fun, value, *others, out=own_sharding(value))


def own_sharding(value: Factored) -> NamedSharding | None:
    """The sharding of a whole value over explicit axes, from the types of its operands; None where none is explicit."""
    mesh = compat.explicit_mesh(value)
    return None if mesh is None else NamedSharding(mesh, own_spec(value))


def stand_in(value: Factored) -> Any:
    """`value.stand_in` with the type of the value, if axes are explicit."""
    sharding = own_sharding(value)
    return value.stand_in if sharding is None else jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

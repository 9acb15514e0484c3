"""Views of a weight: transposes, reshapes, casts. The dims change; the factors stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes, Axis, size_of
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule


@rule("transpose")
def transpose(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """The dims change places."""
    return dataclasses.replace(weight, dims=tuple(weight.dims[d] for d in eqn.params["permutation"]))


@rule("reshape")
def reshape(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Dims merge by joining their axes; a dim splits by splitting an axis in each operand that carries it."""
    if weight.size == 0:
        return NotImplemented
    if eqn.params["dimensions"] is not None:
        weight = dataclasses.replace(weight, dims=tuple(weight.dims[d] for d in eqn.params["dimensions"]))
    weight = weight.without_units()
    queue, dims = list(weight.axes), list[Axes]()
    for size in eqn.params["new_sizes"]:
        group: list[Axis] = []
        while size_of(group) < size:
            axis = queue.pop(0)
            need, rest = divmod(size, size_of(group))
            if rest or (axis.size % need and need % axis.size):
                return NotImplemented
            if axis.size > need:
                weight = weight.split(axis, need)
                axis, minor = axis.split(need)
                queue.insert(0, minor)
            group.append(axis)
        dims.append(tuple(group))
    return dataclasses.replace(weight, dims=tuple(dims))


@rule("squeeze")
def squeeze(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """Dims of size 1 go."""
    return without(weight.without_units(), eqn.params["dimensions"])


def without(weight: Factored, dimensions: tuple[int, ...]) -> Factored:
    """The weight without these dims, which have no axes."""
    dims = tuple(group for d, group in enumerate(weight.dims) if d not in dimensions)
    return dataclasses.replace(weight, dims=dims)


@rule("broadcast_in_dim")
def broadcast_in_dim(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """A new dim is an axis that no operand carries; so is one of size 1 that grows."""
    return broadcast(weight, eqn.params["shape"], eqn.params["broadcast_dimensions"])


def broadcast(weight: Factored, shape: Sequence[int], positions: Sequence[int]) -> Factored:
    """The weight with dims of that shape, its own at those positions."""
    weight = weight.without_units()
    names, old = weight.fresh(), weight.shape
    dims: list[Axes] = [(Axis(next(names), size),) if size > 1 else () for size in shape]
    for group, size, position in zip(weight.dims, old, positions, strict=True):
        if size == shape[position]:
            dims[position] = group
    return dataclasses.replace(weight, dims=tuple(dims))


@rule("tile")
def tile(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """A dim repeated has one axis more, the slowest, that no operand carries."""
    names = weight.fresh()
    dims = tuple(
        (Axis(next(names), reps), *group) if reps > 1 else group
        for reps, group in zip(eqn.params["reps"], weight.dims, strict=True)
    )
    return dataclasses.replace(weight, dims=dims)


@rule("convert_element_type")
def convert_element_type(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """A cast to another floating dtype casts each factor."""
    dtype = jnp.dtype(eqn.params["new_dtype"])
    if not (jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(weight.dtype, jnp.floating)):
        return NotImplemented
    return dataclasses.replace(weight.each(lambda network: network.cast(dtype)), dtype=dtype)


@rule("copy", "copy_p", "stop_gradient", "name")
def identity(_: Interpreter, eqn: Any, weight: Factored) -> Factored:
    """What leaves the value as it is happens to each factor."""
    return weight.map(lambda array, axes: (eqn.primitive.bind(array, **eqn.params), axes))


@rule("optimization_barrier")
def optimization_barrier(_: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """Each array of a weight passes one of its own, so that those of the base take no part in differentiation."""
    plain = iter(lax.optimization_barrier([x for x in operands if not is_factored(x)]))
    return [jax.tree.map(lax.optimization_barrier, x) if is_factored(x) else next(plain) for x in operands]

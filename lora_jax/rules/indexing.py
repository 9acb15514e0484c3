"""Parts of a weight: slices and indices along an axis touch the operands that carry it; a look-up makes activations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lora_jax.contract import Axes, Axis
from lora_jax.factored import Factored, is_factored, total
from lora_jax.lift import Interpreter, rule

Cut = Callable[[jax.Array, int], jax.Array]


def along(weight: Factored, axis: Axis, new: Axes, cut: Cut) -> Factored:
    """The weight with `cut(operand, dimension)` done to each operand that carries `axis`, which `new` replaces."""

    def renamed(axes: Axes) -> Axes:
        return tuple(kept for old in axes for kept in (new if old == axis else (old,)))

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        return (cut(array, axes.index(axis)), renamed(axes)) if axis in axes else (array, axes)

    return dataclasses.replace(weight.map(change), dims=tuple(renamed(group) for group in weight.dims))


@rule("slice")
def static_slice(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """A slice with static bounds."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim
    sizes = eqn.outvars[0].aval.shape

    def cut(d: int) -> Cut:
        return lambda array, dim: lax.slice_in_dim(array, starts[d], limits[d], strides[d], dim)

    return _slice(weight, sizes, cut)


@rule("dynamic_slice")
def dynamic_slice(_: Interpreter, eqn: Any, weight: Any, *starts: Any) -> Any:
    """A slice with traced bounds, such as one layer of a stack."""

    def cut(d: int) -> Cut:
        return lambda array, dim: lax.dynamic_slice_in_dim(array, starts[d], sizes[d], dim)

    sizes = eqn.params["slice_sizes"]
    return _slice(weight, sizes, cut)


def _slice(weight: Factored, sizes: tuple[int, ...], cut: Callable[[int], Cut]) -> Any:
    for d, (group, size, old) in enumerate(zip(weight.dims, sizes, weight.shape, strict=True)):
        if size == old:
            continue
        if len(group) != 1:
            return NotImplemented
        weight = along(weight, group[0], (group[0]._replace(size=size),), cut(d))
    return weight


@rule("split")
def split(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """One weight cut into several along a dimension, such as a fused query, key and value."""
    axis, parts, start = eqn.params["axis"], list[Any](), 0
    for size in eqn.params["sizes"]:
        sizes = tuple(size if d == axis else n for d, n in enumerate(weight.shape))
        bounds = start, start + size
        parts.append(_slice(weight, sizes, lambda _, b=bounds: lambda array, dim: lax.slice_in_dim(array, *b, 1, dim)))
        start += size
    return NotImplemented if NotImplemented in parts else parts


@rule("rev")
def rev(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Dimensions turned around, as in a convolution's transpose."""
    for d in eqn.params["dimensions"]:
        for axis in weight.dims[d]:
            weight = along(weight, axis, (axis,), lambda array, dim: lax.rev(array, (dim,)))
    return weight


@rule("gather")
def gather(interpreter: Interpreter, eqn: Any, weight: Any, indices: Any) -> Any:
    """Rows picked along one dimension: a layer or an expert of a stack, or tokens looked up in an embedding.

    Each operand that carries the dimension's axis is gathered from. What is left is a weight as long as no factor has
    all of its dimensions; once one does, as B has of an embedding's rows, it is an activation, and evaluated.
    """
    picked = _picked(eqn, weight, indices)
    if picked is None:
        return NotImplemented
    numbers, (axis,) = eqn.params["dimension_numbers"], weight.dims[picked]
    column = numbers.start_index_map.index(picked)
    rows = tuple(Axis(f"{axis.name}@{i}", size) for i, size in enumerate(indices.shape[:-1]))

    def pick(fill: Any, array: jax.Array, dim: int) -> jax.Array:
        others = (d for d in range(array.ndim) if d != dim)
        small = lax.GatherDimensionNumbers(
            offset_dims=tuple(d if d < dim else d + len(rows) - 1 for d in others),
            collapsed_slice_dims=(dim,),
            start_index_map=(dim,),
        )
        same = {name: eqn.params[name] for name in ("unique_indices", "indices_are_sorted", "mode")}
        sizes = tuple(1 if d == dim else n for d, n in enumerate(array.shape))
        return lax.gather(array, indices[..., column : column + 1], small, sizes, fill_value=fill, **same)

    # Where rows are out of bounds and filled, the base alone has the fill value; ΔW is zero there.
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    value = along(weight, axis, rows, functools.partial(pick, 0 if filled else None))
    if filled:
        base = along(weight, axis, rows, functools.partial(pick, eqn.params["fill_value"])).base
        value = dataclasses.replace(value, base=base)
    dims = [() if d == picked else group for d, group in enumerate(weight.dims)]
    kept = [group for d, group in enumerate(dims) if d not in numbers.collapsed_slice_dims]
    groups, spread = iter(kept), iter((row,) for row in rows)
    order = range(eqn.outvars[0].aval.ndim)
    value = dataclasses.replace(value, dims=tuple(next(groups if d in numbers.offset_dims else spread) for d in order))
    left = frozenset(axis for group in kept for axis in group)
    if not _is_looked_up(value, left, rows):
        return value
    interpreter.record(weight, eqn, "embedding", (axis,), tuple(left))
    return total(value)


def _picked(eqn: Any, weight: Any, indices: Any) -> int | None:
    """The one dimension that a gather picks single rows along, or None where it does anything else."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not is_factored(weight) or is_factored(indices) or numbers.operand_batching_dims:
        return None
    partial = [d for d, n in enumerate(weight.shape) if sizes[d] != n or d in numbers.collapsed_slice_dims]
    if len(partial) != 1 or partial[0] not in numbers.start_index_map or sizes[partial[0]] != 1:
        return None
    if len(weight.dims[partial[0]]) != 1:
        return None
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        # Along a dimension that is taken whole only 0 is in bounds, which other modes clip to; and rows out of bounds
        # are filled once, by the one operand of each network that has them.
        axis = weight.dims[partial[0]][0]
        carriers = [sum(axis in axes for axes in term.axes) for term in weight.terms]
        scaled = weight.base is not None and len(weight.base.operands) > 1
        if len(numbers.start_index_map) > 1 or set(carriers) != {1} or scaled:
            return None
    return partial[0]


def _is_looked_up(value: Factored, left: frozenset[Axis], rows: Axes) -> bool:
    """Whether picked rows are activations: some factor has all the weight's axes that are left.

    Of a leaf without factors, which is being traced for its uses, rows are activations if they are vectors.
    """
    if not value.deltas:
        return bool(rows) and len(left) <= 1
    return all(any(left.issubset(axes) for axes in delta.axes) for delta in value.deltas)

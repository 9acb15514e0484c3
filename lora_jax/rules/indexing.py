"""Parts of a weight: slices and indices along an axis touch the operands that carry it; a look-up makes activations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.axes import Axes, Axis, size_of
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.rules.layout import without

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
    return _sliced(weight, starts, limits, eqn.params["strides"] or (1,) * weight.ndim)


@rule("split")
def split(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """One weight cut into several along a dimension, such as a fused query, key and value."""
    axis, parts, start = eqn.params["axis"], list[Any](), 0
    for size in eqn.params["sizes"]:
        size = int(size)  # JAX gives NumPy's integers
        starts = [start if d == axis else 0 for d in range(weight.ndim)]
        limits = [start + size if d == axis else n for d, n in enumerate(weight.shape)]
        parts.append(_sliced(weight, starts, limits, (1,) * weight.ndim))
        start += size
    return NotImplemented if NotImplemented in parts else parts


@rule("unstack")
def unstack(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Each entry along a dimension, by itself."""
    axis, parts = eqn.params["axis"], list[Any]()
    for i in range(weight.shape[axis]):
        starts = [i if d == axis else 0 for d in range(weight.ndim)]
        limits = [i + 1 if d == axis else n for d, n in enumerate(weight.shape)]
        part = _sliced(weight, starts, limits, (1,) * weight.ndim)
        parts.append(part if part is NotImplemented else without(part.without_units(), (axis,)))
    return NotImplemented if NotImplemented in parts else parts


def _sliced(weight: Factored, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Any:
    for d, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) != (0, weight.shape[d], 1):
            weight = _cut(weight, d, start, limit, stride)
            if weight is NotImplemented:
                break
    return weight


def _cut(weight: Factored, d: int, start: int, limit: int, stride: int) -> Any:
    """A slice along one dim: along its slowest axis if it is whole rows of that, or else within one such row."""
    axis, *rest = weight.dims[d]
    row = size_of(rest)
    if start % row == 0 and limit % row == 0 and (stride == 1 or row == 1):
        bounds = start // row, limit // row, stride
        new = dataclasses.replace(axis, size=-(-(bounds[1] - bounds[0]) // stride))
        return along(weight, axis, (new,), lambda array, dim: lax.slice_in_dim(array, *bounds, dim))
    first = start // row
    if (limit - 1) // row != first:
        fused = weight.fused(d)
        return NotImplemented if fused is None else _cut(fused, d, start, limit, stride)
    weight = along(weight, axis, (), lambda array, dim: lax.index_in_dim(array, first, dim, keepdims=False))
    return _cut(weight, d, start - first * row, limit - first * row, stride)


@rule("dynamic_slice")
def dynamic_slice(_: Interpreter, eqn: Any, weight: Any, *starts: Any) -> Any:
    """A slice with traced bounds, such as one layer of a stack."""
    if not is_factored(weight) or any(map(is_factored, starts)):
        return NotImplemented
    for d, (size, old) in enumerate(zip(eqn.params["slice_sizes"], weight.shape, strict=True)):
        if size == old:
            continue
        weight = weight.fused(d)
        if weight is None or not weight.dims[d]:
            return NotImplemented
        (axis,), start = weight.dims[d], starts[d]
        new = dataclasses.replace(axis, size=size)
        weight = along(weight, axis, (new,), functools.partial(_from, start, size))
    return weight


def _from(start: Any, size: int, array: jax.Array, dim: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, dim)


@rule("rev")
def rev(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Dimensions turned around, as in a convolution's transpose."""
    for d in eqn.params["dimensions"]:
        for axis in weight.dims[d]:
            weight = along(weight, axis, (axis,), lambda array, dim: lax.rev(array, (dim,)))
    return weight

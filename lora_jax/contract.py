"""Contraction of a tensor network over named axes, pair by pair."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes, Axis
from lora_jax.order import Order, needed, order


def contract(
    operands: Sequence[tuple[jax.Array, Axes]],
    out: Axes,
    *,
    whole: Set[Axis] = frozenset(),
    frozen: Set[int] = frozenset(),
    order: Callable[..., Order] = order,
    dtype: Any = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """The einsum of `operands` over all axes that `out` does not name, pair by pair in the order that `order` gives.

    Args:
      operands: Arrays with the axes of their dimensions; where there is an activation, it comes first.
      out: The axes of the result; one that no operand carries is broadcast.
      whole: The axes of the weight, which no product of factors alone may carry together.
      frozen: The operands, by number, that have no gradient.
      order: What chooses the order, from the operands' axes, those of the result, `whole` and `frozen`.
      dtype: What factors are cast to where they are summed over, if not all operands are of one dtype; element by
        element, products are made in the wider one, and the first operand keeps its own.
      precision: As in `jax.lax.dot_general`.
      preferred_element_type: As in `jax.lax.dot_general`.

    Returns:
      An array with one dimension for each axis of `out`.
    """
    named = [axes for _, axes in operands]
    live = [_sum_out(x, axes, kept) for (x, axes), kept in zip(operands, needed(named, out), strict=True)]
    for i, j in order(tuple(axes for _, axes in live), frozenset(out), frozenset(whole), frozenset(frozen)):
        right, left = live.pop(j), live.pop(i)
        keep = frozenset(out).union(*(axes for _, axes in live))
        # Only the last product leaves the dtype that is computed in: none is wider than it need be.
        wide = None if live else preferred_element_type
        live.insert(i, _product(left, right, keep, i == 0, dtype, precision, wide))
    if len(live) > 1:
        raise ValueError(f"order {order} leaves {len(live)} of {len(operands)} operands unmultiplied: one is wanted")
    return _arrange(*live[0], out)


def _sum_out(array: jax.Array, axes: Axes, kept: Set[Axis]) -> tuple[jax.Array, Axes]:
    """Sums over the axes that neither the result nor another operand has."""
    dims = [d for d, axis in enumerate(axes) if axis not in kept]
    return (jnp.sum(array, dims), tuple(axis for axis in axes if axis in kept)) if dims else (array, axes)


def _product(
    left: tuple[jax.Array, Axes],
    right: tuple[jax.Array, Axes],
    keep: Set[Axis],
    is_lead: bool,
    dtype: Any,
    precision: Any,
    preferred_element_type: Any,
) -> tuple[jax.Array, Axes]:
    """The product of two operands over their shared axes that are not in `keep`."""
    (a, a_axes), (b, b_axes) = left, right
    shared = [axis for axis in a_axes if axis in b_axes]
    summed = tuple(axis for axis in shared if axis not in keep)
    batch = tuple(axis for axis in shared if axis in keep)
    a_free = tuple(axis for axis in a_axes if axis not in shared)
    b_free = tuple(axis for axis in b_axes if axis not in shared)
    if not summed:  # nothing to sum: an element-wise product, with broadcasting
        out = (*a_axes, *b_free)
        wide = wider(a.dtype, b.dtype)
        product = _arrange(a, a_axes, out).astype(wide) * _arrange(b, b_axes, out).astype(wide)
        return (product.astype(a.dtype) if is_lead else product), out
    (a_sum, a_batch), (b_sum, b_batch) = (
        [tuple(axes.index(axis) for axis in group) for group in (summed, batch)] for axes in (a_axes, b_axes)
    )
    dims = ((a_sum, b_sum), (a_batch, b_batch))
    out = (*batch, *a_free, *b_free)
    a, b = a if is_lead or not dtype else a.astype(dtype), b.astype(dtype) if dtype else b
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=preferred_element_type), out


def _arrange(array: jax.Array, axes: Axes, out: Axes) -> jax.Array:
    """The array with its dimensions in the order of `out`, broadcast over the axes that it does not have."""
    array = transpose(array, [axes.index(axis) for axis in out if axis in axes])
    if len(axes) == len(out):
        return array
    dims = tuple(d for d, axis in enumerate(out) if axis in axes)
    return lax.broadcast_in_dim(array, tuple(axis.size for axis in out), dims)


def wider(*dtypes: Any) -> Any:
    """The dtype that holds each of these, whatever JAX is told of promotion.

    >>> wider("bfloat16", "float16")
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def transpose(array: jax.Array, permutation: Sequence[int]) -> jax.Array:
    """`jax.lax.transpose` that writes no equation where nothing moves."""
    return array if list(permutation) == list(range(array.ndim)) else lax.transpose(array, tuple(permutation))


def reshape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`jax.lax.reshape` that writes no equation where nothing changes."""
    return array if array.shape == shape else lax.reshape(array, shape)

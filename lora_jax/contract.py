"""Contraction of a tensor network over named axes, in the cheapest order that never forms a whole weight."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Axis:
    """A named axis, of a weight or of anything else; axes of the same name and size are the same axis.

    Attributes:
      name: Its name.
      size: Its length.
      roots: The dimensions of leaves that it comes from, as pairs of path and number; for messages.
    """

    name: str
    size: int
    roots: tuple[tuple[str, int], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.size, np.integer):  # as some of JAX's equations have it
            object.__setattr__(self, "size", int(self.size))

    def split(self, major: int) -> tuple[Axis, Axis]:
        """The axis as two, the first of size `major`.

        >>> Axis("1", 512).split(8)
        (Axis(name='1.0', size=8, roots=()), Axis(name='1.1', size=64, roots=()))
        """
        return Axis(f"{self.name}.0", major, self.roots), Axis(f"{self.name}.1", self.size // major, self.roots)


Axes = tuple[Axis, ...]
Order = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a contraction costs, forward.

    Attributes:
      base: FLOPs with a weight's base, two for each multiplication and addition.
      low_rank: FLOPs with its factors.
      order: The order of the products, such as "(x·A)·B"; sums of several contractions are joined by " + ".
    """

    base: int = 0
    low_rank: int = 0
    order: str = ""

    def times(self, n: int) -> Cost:
        """The cost of `n` such contractions.

        >>> Cost(10, 2, "x·A").times(3)
        Cost(base=30, low_rank=6, order='x·A')
        """
        return dataclasses.replace(self, base=n * self.base, low_rank=n * self.low_rank)


def letters(n: int) -> tuple[str, ...]:
    """What the factors of a network are called in an expression.

    >>> letters(3), letters(28)[-2:]
    (('A', 'B', 'C'), ('A1', 'B1'))
    """
    return tuple(string.ascii_uppercase[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(n))


def size_of(axes: Sequence[Axis] | Set[Axis]) -> int:
    """How many entries an array over these axes has."""
    return math.prod(axis.size for axis in axes)


def order(
    operands: tuple[Axes, ...],
    out: frozenset[Axis],
    whole: frozenset[Axis] = frozenset(),
    frozen: frozenset[int] = frozenset(),
    lead: bool = True,
) -> Order:
    """The cheapest sequence of pairs i < j to multiply, each product taking the place of its left operand.

    The cost is the number of multiplications of a training step: those of each product, and again those of the
    gradient of each of the two that has one, as all operands do but the `frozen`. No product of factors alone may carry
    all of `whole`; the first operand is no factor if it is a `lead`, that is an activation.

    >>> n, d, r, k = Axis("n", 64), Axis("d", 512), Axis("r", 8), Axis("k", 512)
    >>> order(((n, d), (d, r), (r, k)), frozenset({n, k}))  # (x·A)·B, not x·(A·B)
    ((0, 1), (0, 1))
    >>> operands = (n, d), (d, r), (r, k), (k,)
    >>> order(operands, frozenset({n, k}), frozen=frozenset({1, 2}))  # ((x·A)·B)·b, not (x·A)·(B·b)
    ((0, 1), (0, 1), (0, 1))
    """
    return _search(operands, out, whole, frozen, lead)[1]


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
    live = [_sum_out(x, axes, kept) for (x, axes), kept in zip(operands, _kept(named, out), strict=True)]
    for i, j in order(tuple(axes for _, axes in live), frozenset(out), frozenset(whole), frozenset(frozen)):
        right, left = live.pop(j), live.pop(i)
        keep = frozenset(out).union(*(axes for _, axes in live))
        # Only the last product leaves the dtype that is computed in: none is wider than it need be.
        wide = None if live else preferred_element_type
        live.insert(i, _product(left, right, keep, i == 0, dtype, precision, wide))
    if len(live) > 1:
        raise ValueError(f"order {order} leaves {len(live)} of {len(operands)} operands unmultiplied: one is wanted")
    return _arrange(*live[0], out)


def work(
    operands: Sequence[Axes],
    out: Axes,
    names: Sequence[str],
    whole: Set[Axis] = frozenset(),
    frozen: Set[int] = frozenset(),
    order: Callable[..., Order] = order,
) -> tuple[int, str]:
    """The FLOPs of `contract`, and its order as an expression over `names`, one for each operand.

    >>> n, d, r, k = Axis("n", 64), Axis("d", 512), Axis("r", 8), Axis("k", 512)
    >>> work([(n, d), (d, r), (r, k)], (n, k), "xAB")
    (1048576, '(x·A)·B')
    """
    return _work(tuple(operands), tuple(out), tuple(names), frozenset(whole), frozenset(frozen), order)


@functools.lru_cache(maxsize=4096)
def _work(
    operands: tuple[Axes, ...],
    out: Axes,
    names: tuple[str, ...],
    whole: frozenset[Axis],
    frozen: frozenset[int],
    order: Callable[..., Order],
) -> tuple[int, str]:
    live = [tuple(a for a in axes if a in kept) for axes, kept in zip(operands, _kept(operands, out), strict=True)]
    words, flops = list(names), 0
    for i, j in order(tuple(live), frozenset(out), whole, frozen):
        right, left = live.pop(j), live.pop(i)
        union, keep = frozenset(left) | frozenset(right), frozenset(out).union(*live)
        flops += size_of(union) * (1 if union <= keep else 2)
        live.insert(i, tuple(union & keep))
        word = words.pop(j)
        words[i] = f"({words[i]}·{word})"
    return flops, words[0].removeprefix("(").removesuffix(")") if len(names) > 1 else words[0]


def _kept(operands: Sequence[Axes], out: Axes) -> list[frozenset[Axis]]:
    """For each operand, the axes that the result or another operand has."""
    return [frozenset(out).union(*operands[:i], *operands[i + 1 :]) for i in range(len(operands))]


@functools.lru_cache(maxsize=4096)
def _search(
    operands: tuple[Axes, ...], out: frozenset[Axis], whole: frozenset[Axis], frozen: frozenset[int], lead: bool
) -> tuple[float, Order]:
    if len(operands) == 1:
        return 0, ()
    best: tuple[float, Order] = (math.inf, ())
    for i in range(len(operands)):
        for j in range(i + 1, len(operands)):
            union = frozenset(operands[i]) | frozenset(operands[j])
            product = tuple(sorted(union & out.union(*operands[:i], *operands[i + 1 : j], *operands[j + 1 :])))
            if (i > 0 or not lead) and whole and whole.issubset(product):
                continue
            rest = operands[:i] + (product,) + operands[i + 1 : j] + operands[j + 1 :]
            moving = (i not in frozen) + (j not in frozen)
            held = {n - (n > j) for n in frozen if n not in (i, j)} | (set() if moving else {i})
            cost, tail = _search(rest, out, whole, frozenset(held), lead)
            # A size that is not known yet (of an exported function) counts as that of a large batch.
            known = math.prod(axis.size if isinstance(axis.size, int) else 4096 for axis in union)
            best = min(best, (known * (1 + moving) + cost, ((i, j), *tail)))
    return best


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

"""Two Factored values over the same axes where they meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lora_jax.axes import Axis, fresh, roots_of
from lora_jax.factored import Factored


def aligned(left: Factored, right: Factored, pairs: Sequence[tuple[int, int]]) -> tuple[Factored, Factored] | None:
    """Both values over the same axes where their dims are paired, and over different ones where they are not.

    Args:
      left: A value.
      right: Another.
      pairs: A dim of the one and a dim of the other that are to have the same axes; dims of size 1 need none.

    Returns:
      The values with axes split as finely as both need, or None where they do not fit.
    """
    left, right = left.without_units(), right.without_units()
    same: dict[Axis, tuple[Axis, Axis]] = {}
    for a, b in pairs:
        refined = _refined(left, right, a, b)
        if refined is None:
            one, other = left.fused(a), right.fused(b)
            refined = None if one is None or other is None else _refined(one, other, a, b)
        if refined is None:
            return None
        left, right = refined
        same.update({y: (x, y) for x, y in zip(left.dims[a], right.dims[b], strict=False)})
    unused = fresh(left.names | right.names)
    others: dict[Axis, Axis] = {}

    def of_right(axis: Axis) -> Axis:
        if axis in same:
            return _with_roots(*same[axis])
        if axis.name not in left.names:
            return axis
        return others.setdefault(axis, dataclasses.replace(axis, name=next(unused)))

    joined = {x: _with_roots(x, y) for x, y in same.values()}
    return left.relabel(lambda axis: joined.get(axis, axis)), right.relabel(of_right)


def _refined(left: Factored, right: Factored, a: int, b: int) -> tuple[Factored, Factored] | None:
    """Both with axes of the same sizes along a dim of each; None where the one's do not divide the other's."""
    i = 0
    while i < min(len(left.dims[a]), len(right.dims[b])):
        x, y = left.dims[a][i], right.dims[b][i]
        if not x.size or not y.size or max(x.size, y.size) % min(x.size, y.size):
            return None
        if x.size > y.size:
            left = left.split(x, y.size)
        elif y.size > x.size:
            right = right.split(y, x.size)
        i += 1
    return None if left.dims[a] and right.dims[b] and left.shape[a] != right.shape[b] else (left, right)


def _with_roots(axis: Axis, other: Axis) -> Axis:
    """The axis, that comes from where the other comes from too."""
    return dataclasses.replace(axis, roots=roots_of([axis], [other]))

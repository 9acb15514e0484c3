"""Weights put together: sums, products, concatenations and choices of Factored values, which are Factored again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.alignment import aligned
from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import contract, reshape
from lora_jax.factored import Factored
from lora_jax.materialize import total
from lora_jax.network import Network


def plain(array: Any) -> Factored:
    """An array as a value of no leaf."""
    return dataclasses.replace(Factored.of(array, ""), paths=()).relabel(lambda axis: Axis(axis.name, axis.size))


def base_of(value: Factored) -> jax.Array:
    """The base alone, as the function would have it without ΔW."""
    return total(dataclasses.replace(value, deltas=()))


def dense(array: jax.Array, dims: tuple[Axes, ...]) -> Network:
    """An array as a network of one operand, over the axes of these dims."""
    axes = tuple(axis for group in dims for axis in group)
    return Network((reshape(array, tuple(axis.size for axis in axes)),), (axes,))


def add(left: Factored, right: Factored) -> Factored | None:
    """left + right, of the same number of dims, of which those of size 1 are broadcast."""
    pair = aligned(left, right, [(d, d) for d in range(left.ndim)])
    if pair is None:
        return None
    left, right = pair
    dims = tuple(a or b for a, b in zip(left.dims, right.dims, strict=True))
    base = dense(jnp.broadcast_to(base_of(left) + base_of(right), tuple(map(size_of, dims))), dims)
    return joined((left, right), dims, base, left.deltas + right.deltas)


def multiply(left: Factored, right: Factored) -> Factored | None:
    """left ∘ right, element by element, of the same number of dims, of which those of size 1 are broadcast."""
    pair = aligned(left, right, [(d, d) for d in range(left.ndim)])
    if pair is None:
        return None
    left, right = pair
    dims = tuple(a or b for a, b in zip(left.dims, right.dims, strict=True))
    base = dense(jnp.broadcast_to(base_of(left) * base_of(right), tuple(map(size_of, dims))), dims)
    return dataclasses.replace(joined((left, right), dims, base, _cross(left, right)), is_product=True)


def matmul(
    left: Factored,
    right: Factored,
    batch: Sequence[tuple[int, int]],
    summed: Sequence[tuple[int, int]],
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> Factored | None:
    """The product of two weights over pairs of dims, as `product` makes it of their bases."""
    pair = aligned(left, right, [*batch, *summed])
    if pair is None:
        return None
    left, right = pair
    batched, gone = [a for a, _ in batch], [a for a, _ in (*batch, *summed)]
    dims = [left.dims[d] for d in batched] + [left.dims[d] for d in range(left.ndim) if d not in gone]
    gone = [b for _, b in (*batch, *summed)]
    dims = (*dims, *(right.dims[d] for d in range(right.ndim) if d not in gone))
    base = product(base_of(left), base_of(right))
    value = joined((left, right), dims, dense(base, dims), _cross(left, right))
    return dataclasses.replace(value, dtype=base.dtype)


def choose(which: jax.Array, cases: Sequence[Factored]) -> Factored | None:
    """The case that is named, of values of the same shape: by one number, or by one for each entry of some dims.

    Args:
      which: The number of a case, or a boolean; of as many dimensions as the cases, most of size 1.
      cases: Values of the same shape.

    Returns:
      A value that costs what a case costs, if all are of one form, or else what all cases cost; None where the axes do
      not fit.
    """
    aligned_cases = align_all(cases, range(cases[0].ndim))
    if aligned_cases is None:
        return None
    cases, dims = [case.each(Network.among_others) for case in aligned_cases], aligned_cases[0].dims
    base = dense(lax.select_n(jnp.broadcast_to(which, cases[0].shape), *map(base_of, cases)), dims)
    varying = tuple(axis for size, group in zip(which.shape, dims, strict=True) if size > 1 for axis in group)
    which = reshape(which, tuple(axis.size for axis in varying))
    forms = {tuple(form(delta, frozenset(case.axes)) for delta in case.deltas) for case in cases}
    deltas = _factor_by_factor(which, varying, cases) if len(forms) == 1 else None
    if deltas is None:
        picked = [which == jnp.asarray(i, which.dtype) for i in range(len(cases))]
        deltas = tuple(
            _only_if(p, varying, delta) for p, case in zip(picked, cases, strict=True) for delta in case.deltas
        )
    return joined(cases, dims, base, deltas)


def _factor_by_factor(which: jax.Array, varying: Axes, cases: Sequence[Factored]) -> tuple[Network, ...] | None:
    """The networks that each case has, with every operand chosen; None if one of them does not vary as `which` does."""
    deltas = []
    for same in zip(*(case.deltas for case in cases), strict=True):
        operands = []
        for axes, arrays in zip(same[0].axes, zip(*(delta.operands for delta in same), strict=True), strict=True):
            if not {*varying} <= {*axes}:
                return None
            operands.append(lax.select_n(_spread(which, varying, axes), *arrays))
        deltas.append(dataclasses.replace(same[0], operands=tuple(operands)))
    return tuple(deltas)


def _only_if(condition: jax.Array, varying: Axes, network: Network) -> Network:
    """The network where a condition holds, and zero elsewhere: then one operand is, whatever is in the others."""
    carriers = [i for i, axes in enumerate(network.axes) if {*varying} <= {*axes}]
    if not carriers:
        return network.times(condition.astype(network.operands[0].dtype), varying)
    small = min(carriers, key=lambda i: network.operands[i].size)
    kept = [
        jnp.where(_spread(condition, varying, axes), x, jnp.zeros_like(x)) if i == small else x
        for i, (x, axes) in enumerate(zip(network.operands, network.axes, strict=True))
    ]
    return dataclasses.replace(network, operands=tuple(kept))


def _spread(array: jax.Array, own: Axes, axes: Axes) -> jax.Array:
    """An array over some axes as one over more."""
    return contract([(array, own)], axes)


def align_all(values: Sequence[Factored], dims: Sequence[int]) -> list[Factored] | None:
    """Several values over the same axes along these dims, as `aligned` makes two of them."""
    first, *rest = values
    for _ in range(2):  # the second round splits the axes of the earlier ones as finely as those of the later
        for i, value in enumerate(rest):
            pair = aligned(first, value, [(d, d) for d in dims])
            if pair is None:
                return None
            first, rest[i] = pair
    return [first, *rest]


def form(network: Network, axes: frozenset[Axis]) -> Any:
    """What is the same for networks that differ in the numbers in their operands, and in the names of inner axes."""
    numbers: dict[Axis, int] = {}

    def of(axis: Axis) -> Any:
        return axis if axis in axes else (numbers.setdefault(axis, len(numbers)), axis.size)

    kinds = tuple(
        (str(x.dtype), tuple(map(of, named))) for x, named in zip(network.operands, network.axes, strict=True)
    )
    drop = network.dropout and (network.dropout.rate, tuple(map(of, network.dropout.axes)))
    return kinds, network.scale, drop, network.frozen


def all_carrying(network: Network, axes: Iterable[Axis]) -> Network:
    """The network with operands that carry these axes, along which its entries can then differ or be summed."""
    for axis in axes:
        if not any(axis in own for own in network.axes):
            network = network.times(jnp.ones(axis.size, network.operands[0].dtype), (axis,))
    return network


def _cross(left: Factored, right: Factored) -> tuple[Network, ...]:
    """The products of each network of the one with each of the other, but for that of the bases."""
    return tuple(
        Network(
            a.operands + b.operands,
            a.axes + b.axes,
            a.scale * b.scale,
            a.dropout or b.dropout,
            a.frozen | {len(a.operands) + i for i in b.frozen},
        )
        for a in left.each(Network.among_others).terms
        for b in right.each(Network.among_others).terms
        if not (a is left.base and b is right.base)
    )


def joined(parts: Sequence[Factored], dims: tuple[Axes, ...], base: Network, deltas: Sequence[Network]) -> Factored:
    """What is put together from several values: it comes from where each comes from, and is what any is."""
    return Factored(
        base,
        tuple(deltas),
        dims,
        parts[0].dtype,
        paths=tuple(dict.fromkeys(path for part in parts for path in part.paths)),
        adapted=any(part.adapted for part in parts),
        mixed=any(part.mixed for part in parts),
        is_product=any(part.is_product for part in parts),
        picked=tuple(dict.fromkeys(axis for part in parts for axis in part.picked)),
    )

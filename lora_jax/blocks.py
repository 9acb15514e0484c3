"""Concatenation of Factored values: one value over the blocks of a dim, at the cost of its parts."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.axes import Axes, Axis, fresh, roots_of
from lora_jax.factored import Factored
from lora_jax.joint import align_all, base_of, dense, form, joined
from lora_jax.network import Dropout, Network

_Network = tuple[Network, list["_Piece"]]


def concatenate(parts: Sequence[Factored], dim: int) -> Factored | None:
    """Values one after another along a dim, as one value over blocks of that dim.

    The blocks are as long as every part's length allows. Networks of the same form become one: an operand that runs
    along the dim has its blocks one after another, any other has one entry for each part; and where a part has several
    blocks, or none, a matrix of ones and zeros says which block belongs to which part. Layers stacked along a new dim
    are the case of one block for each.

    Args:
      parts: Values that differ in that dim's length alone.
      dim: The dim.

    Returns:
      The value, or None where the parts' axes do not fit.
    """
    parts = [part for part in parts if part.shape[dim]]
    lengths = [part.shape[dim] for part in parts]
    equal = len(set(lengths)) == 1
    together = align_all(parts, [d for d in range(parts[0].ndim) if equal or d != dim])
    if together is None:
        return None
    names = fresh(frozenset().union(*(part.names for part in together)))
    roots = roots_of(*(part.dims[dim] for part in together))
    size = math.gcd(*lengths)
    block = Axis(next(names), sum(lengths) // size, roots)
    inner = together[0].dims[dim] if equal else (Axis(next(names), size, roots),) if size > 1 else ()
    cut = together if equal else [_blocked(part, dim, block, inner) for part in together]
    blocked = [part for part in cut if part is not None]
    if len(blocked) < len(cut):
        return None
    dims = tuple((block, *inner) if d == dim else group for d, group in enumerate(blocked[0].dims))
    base = dense(jnp.concatenate([base_of(part) for part in together], dim), dims)
    counts = [length // size for length in lengths]
    own = frozenset(axis for group in dims for axis in group)
    alike = _alike(blocked, own, block, inner, counts)
    return joined(together, dims, base, [_stacked(same, counts, block, next(names)) for same in alike])


def _blocked(part: Factored, dim: int, block: Axis, inner: Axes) -> Factored | None:
    """The part with its dim made of blocks: an axis named as `block`, if it has several, and `inner`."""
    if not part.dims[dim]:
        return part
    fused = part.fused(dim)
    if fused is None:
        return None
    axis, length, size = fused.dims[dim][0], part.shape[dim], math.prod(axis.size for axis in inner)
    if size == length:
        return fused.relabel(lambda a: inner[0] if a == axis else a)
    if size == 1:
        return fused.relabel(lambda a: dataclasses.replace(a, name=block.name) if a == axis else a)
    major, minor = axis.split(length // size)
    names = {major: dataclasses.replace(major, name=block.name), minor: inner[0]}
    return fused.split(axis, major.size).relabel(lambda a: names.get(a, a))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """An operand of one part: whether it runs along the dim (its blocks are first then), and its other axes."""

    array: jax.Array
    axes: Axes
    runs: bool


def _pieces(network: Network, block: Axis, inner: Axes) -> list[_Piece]:
    def piece(array: jax.Array, axes: Axes) -> _Piece:
        for i, axis in enumerate(axes):
            if axis.name == block.name:
                return _Piece(jnp.moveaxis(array, i, 0), axes[:i] + axes[i + 1 :], True)
        runs = any(axis in axes for axis in inner)
        return _Piece(array[None] if runs else array, axes, runs)

    return [piece(array, axes) for array, axes in zip(network.operands, network.axes, strict=True)]


def _alike(
    parts: Sequence[Factored], own: frozenset[Axis], block: Axis, inner: Axes, counts: Sequence[int]
) -> list[dict[int, _Network]]:
    """The networks of all parts in groups of the same form, by the number of the part.

    Those that drop inputs draw a mask each, so that they stay apart, unless every block is a part with its own key.
    """
    groups: dict[Any, dict[int, _Network]] = {}
    for i, part in enumerate(parts):
        seen = collections.Counter[Any]()
        for delta in part.deltas:
            pieces = _pieces(delta, block, inner)
            bare = Network(tuple(p.array for p in pieces), tuple(p.axes for p in pieces), delta.scale, delta.dropout)
            mask = i if delta.dropout and max(counts) > 1 else None
            key = form(bare, own), tuple(p.runs for p in pieces), mask
            groups.setdefault((key, seen[key]), {})[i] = delta, pieces
            seen[key] += 1
    return list(groups.values())


def _stacked(alike: dict[int, _Network], counts: Sequence[int], block: Axis, name: str) -> Network:
    """The networks of some parts as one, over all blocks."""
    first, pieces = next(iter(alike.values()))
    one_each = len(alike) == len(counts) == sum(counts)
    lead = block if one_each else Axis(name, len(alike))

    def operand(k: int) -> tuple[jax.Array, Axes]:
        found = {i: parts[k].array for i, (_, parts) in alike.items()}
        model = pieces[k]
        if model.runs:
            blank = [jnp.zeros((count, *model.array.shape[1:]), model.array.dtype) for count in counts]
            return jnp.concatenate([found.get(i, blank[i]) for i in range(len(counts))]), (block, *model.axes)
        if one_each or len(alike) > 1:
            return jnp.stack(list(found.values())), (lead, *model.axes)
        return model.array, model.axes

    operands = [operand(k) for k in range(len(pieces))]
    running = [piece.runs for piece in pieces]
    if not one_each and not (any(running) if len(alike) == 1 else all(running)):
        owner = np.repeat(np.arange(len(counts)), counts)
        belongs = np.equal(np.asarray(list(alike))[:, None], owner)
        dtype = pieces[0].array.dtype
        operands.append(
            (jnp.asarray(belongs, dtype), (lead, block))
            if len(alike) > 1
            else (jnp.asarray(belongs[0], dtype), (block,))
        )
    drop = _keys({i: network.dropout for i, (network, _) in alike.items() if network.dropout}, counts, block, one_each)
    return Network(tuple(x for x, _ in operands), tuple(axes for _, axes in operands), first.scale, drop)


def _keys(alike: dict[int, Dropout], counts: Sequence[int], block: Axis, one_each: bool) -> Dropout | None:
    """The keys of all parts, over all blocks if each block has its own; those of blocks that are zero are any."""
    if not alike:
        return None
    first = next(iter(alike.values()))
    runs = [i for i, axis in enumerate(first.axes) if axis.name == block.name]
    if runs:
        keys = {i: jnp.moveaxis(drop.keys, runs[0], 0) for i, drop in alike.items()}
        some = next(iter(keys.values()))[:1]
        rows = [keys.get(i, jnp.repeat(some, count, 0)) for i, count in enumerate(counts)]
        axes = (block, *(axis for axis in first.axes if axis.name != block.name))
        return dataclasses.replace(first, keys=jnp.concatenate(rows), axes=axes)
    if one_each:
        keys = jnp.stack([drop.keys for drop in alike.values()])
        return dataclasses.replace(first, keys=keys, axes=(block, *first.axes))
    return first

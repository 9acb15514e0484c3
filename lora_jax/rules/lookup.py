"""Gather: rows picked out of a weight, which are a weight again (layers, experts) or activations (embeddings)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import joint
from lora_jax.axes import Axes, Axis
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.materialize import cost_of, total
from lora_jax.network import Network


@rule("gather")
def gather(interpreter: Interpreter, eqn: Any, weight: Any, indices: Any) -> Any:
    """Each operand that carries an axis that is picked along is gathered from; the others stay as they are.

    What is left is a weight as long as no factor has all of its dimensions; once one does, as B has of an embedding's
    rows, it is an activation, and evaluated.
    """
    if not is_factored(weight) or is_factored(indices):
        return NotImplemented
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    for d in (d for d in numbers.start_index_map if sizes[d] < weight.shape[d]):
        fused = weight.fused(d)
        if fused is None:
            return NotImplemented
        weight = fused
    pick = _pick(eqn, weight, indices)
    if pick is None:
        return NotImplemented
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    base = weight.base
    if filled and not (base and _fillable(base, pick, eqn.params["fill_value"])):
        base = joint.dense(joint.base_of(weight), weight.dims)
    # Where rows are out of bounds and filled, the base alone has the fill value; ΔW is zero there.
    zero = 0 if filled else None
    deltas = [pick.of(joint.all_carrying(delta, pick.axes) if filled else delta, zero) for delta in weight.deltas]
    base = base and pick.of(base, eqn.params["fill_value"] if filled else None)

    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = {axis: (window,) if window.size > 1 else () for axis, window in pick.axes.items()}
    kept = [windows.get(group[0], group) if group else () for d, group in enumerate(weight.dims) if d not in gone]
    groups, rows = iter(kept), iter((row,) for row in pick.rows)
    order = range(eqn.outvars[0].aval.ndim)
    dims = tuple(next(groups if d in numbers.offset_dims else rows) for d in order)
    value = dataclasses.replace(weight, base=base, deltas=tuple(deltas), dims=dims)
    left = frozenset(axis for group in kept for axis in group if axis.roots)
    if not value.adapted and not (pick.rows and len(left) <= 1):
        return dataclasses.replace(value, picked=(*weight.picked, *pick.axes))
    small = any(left.issubset(axes) for delta in value.deltas for axes in delta.axes)
    if value.adapted and not (small or (pick.rows and len(left) <= 1 and not value.deltas)):
        return value
    interpreter.record(weight, eqn, "embedding", tuple(pick.axes), tuple(left), cost_of(value, pick.rows))
    return total(value)


class Pick(NamedTuple):
    """What is picked, in names of axes.

    Attributes:
      axes: For each axis that is picked along, the axis of the window that is taken at each place, of size 1 mostly.
      columns: For each such axis, the column of `indices` that says where.
      batch: For each axis that weight and indices share, the dimension of `indices` that it is.
      rows: The axes of the dimensions of `indices`, but for the last.
      indices: Where, as `jax.lax.gather` takes it.
      params: The other parameters of the gather.
    """

    axes: dict[Axis, Axis]
    columns: dict[Axis, int]
    batch: dict[Axis, int]
    rows: Axes
    indices: jax.Array
    params: dict[str, Any]

    def of(self, network: Network, fill: Any) -> Network:
        """The network with rows of each operand that carries an axis picked along."""

        def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
            return self.rows_of(array, axes, fill) if any(axis in self.axes for axis in axes) else (array, axes)

        return network.map(change)

    def rows_of(self, array: jax.Array, axes: Axes, fill: Any) -> tuple[jax.Array, Axes]:
        """The rows of one operand, and their axes."""
        own = [d for d, axis in enumerate(axes) if axis in self.axes]
        single = [d for d in own if self.axes[axes[d]].size == 1]
        shared = [d for d, axis in enumerate(axes) if axis in self.batch]
        others = [d for d in range(len(axes)) if d not in (*single, *shared)]
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(len(self.rows), len(self.rows) + len(others))),
            collapsed_slice_dims=tuple(single),
            start_index_map=tuple(own),
            operand_batching_dims=tuple(shared),
            start_indices_batching_dims=tuple(self.batch[axes[d]] for d in shared),
        )
        windows = [self.axes.get(axis, axis) for axis in axes]
        sizes = tuple(1 if d in shared else window.size for d, window in enumerate(windows))
        indices = self.indices[..., jnp.array([self.columns[axes[d]] for d in own])]
        found = lax.gather(array, indices, numbers, sizes, fill_value=fill, **self.params)
        return found, (*self.rows, *(windows[d] for d in others))


def _fillable(base: Network, pick: Pick, fill: Any) -> bool:
    """Whether rows of each operand can be filled, and their product is then too, as by 0 or what is not a number."""
    if len(base.operands) > 1 and not (fill is None or fill == 0 or fill != fill):
        return False
    return any({*pick.axes} <= {*axes} for axes in base.axes)


def _pick(eqn: Any, weight: Factored, indices: jax.Array) -> Pick | None:
    """What a gather picks; None where it does what axes cannot."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    filled = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    names = weight.fresh()
    axes: dict[Axis, Axis] = {}
    columns: dict[Axis, int] = {}
    for column, d in enumerate(numbers.start_index_map):
        group, size = weight.dims[d], int(sizes[d])
        if size == weight.shape[d] and (size > 1 or not group):
            if filled:  # only 0 is in bounds, which other modes clip to
                return None
            continue
        if len(group) != 1 or (filled and size > 1):
            return None
        axes[group[0]] = dataclasses.replace(group[0], name=next(names), size=size)
        columns[group[0]] = column
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    if any(sizes[d] != n for d, n in enumerate(weight.shape) if d not in indexed):
        return None
    batch: dict[Axis, int] = {}
    for d, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        if len(weight.dims[d]) > 1:
            return None
        batch.update(dict.fromkeys(weight.dims[d], place))
    shared = {place: axis for axis, place in batch.items()}
    rows = tuple(shared[i] if i in shared else Axis(next(names), n) for i, n in enumerate(indices.shape[:-1]))
    params = {name: eqn.params[name] for name in ("unique_indices", "indices_are_sorted", "mode")}
    return Pick(axes, columns, batch, rows, indices, params)

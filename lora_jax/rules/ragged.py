"""Ragged products, as of tokens sorted by expert: each expert has factors of its own, or shares them.

A row of the activation is of one group, so it is as if rows had the axis of the groups: where a factor has it too, each
row meets its own group's entry, and nothing is summed. The order of products is that of an einsum with as many rows in
each group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import contract, reshape
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.network import Network, after_lead
from lora_jax.order import Cost, Order, letters, work

Operand = tuple[jax.Array, Axes]


@rule("ragged_dot_general")
def ragged_dot_general(interpreter: Interpreter, eqn: Any, x: Any, weight: Any, sizes: Any) -> Any:
    """Rows of x times the matrix of their group; groups follow one another, and rows beyond the last are zero."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    grouped = numbers.rhs_group_dimensions and eqn.params["group_offset"] is None
    if is_factored(x) or is_factored(sizes) or weight.is_product or not grouped:
        return NotImplemented
    (_, w_sum), _ = numbers.dot_dimension_numbers
    inner, outer = (_flat(weight.dims[d] for d in dims) for dims in (w_sum, _w_free(weight, numbers)))
    weight = weight.without_units()
    ragged = _named(eqn, x, weight, interpreter.plan.order)
    interpreter.record(weight, eqn, "linear", inner, outer, ragged.cost(weight))
    parts = [
        eqn.primitive.bind(x, _array(term.at(weight.dtype), weight.dims), sizes, **eqn.params)
        if len(term.operands) == 1 and {*weight.axes}.issubset(*term.axes)
        else _part(eqn, ragged, term.dropout(x) if term.dropout else x, term.at(weight.dtype), after_lead(term), sizes)
        for term in weight.terms
    ]
    out = eqn.outvars[0].aval
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(out.shape, out.dtype)


def _w_free(weight: Factored, numbers: Any) -> list[int]:
    (_, w_sum), (_, w_batch) = numbers.dot_dimension_numbers
    return [d for d in range(weight.ndim) if d not in (*w_sum, *w_batch, *numbers.rhs_group_dimensions)]


class _Ragged(NamedTuple):
    """A ragged product in names of axes.

    Attributes:
      x: The axes of the activation.
      batch: Those of each batch dimension.
      free: Those that x alone has, in order.
      row: The one of them whose entries are in groups.
      group: The axes of the groups.
      out: The axes of the result.
      whole: The axes of one group's matrix.
      order: What chooses the order of products.
    """

    x: Axes
    batch: tuple[Axes, ...]
    free: Axes
    row: Axis
    group: Axes
    out: Axes
    whole: frozenset[Axis]
    order: Callable[..., Order]

    def even(self, axes: Axes) -> Axes:
        """The axes with that of the rows as if each group had as many."""
        rows = (*self.group, Axis("rows", -(-self.row.size // size_of(self.group))))
        return tuple(new for axis in axes for new in (rows if axis == self.row else (axis,)))

    def cost(self, weight: Factored) -> Cost:
        """What it costs with a weight's base, and with its factors."""

        def costs(term: Network) -> tuple[int, str]:
            operands = [self.even(self.x), *term.axes]
            return work(
                operands,
                self.even(self.out),
                ("x", *letters(len(term.axes))),
                self.whole,
                after_lead(term),
                self.order,
            )

        base, _ = (0, "") if weight.base is None else costs(weight.base)
        deltas = [costs(delta) for delta in weight.deltas]
        return Cost(base, sum(flops for flops, _ in deltas), " + ".join(word for _, word in deltas))


def _named(eqn: Any, x: jax.Array, weight: Factored, order: Callable[..., Order]) -> _Ragged:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_sum, w_sum), (x_batch, w_batch) = numbers.dot_dimension_numbers
    names: list[Axes] = [(Axis(f"x{d}", size),) for d, size in enumerate(x.shape)]
    for xd, wd in (*zip(x_sum, w_sum, strict=True), *zip(x_batch, w_batch, strict=True)):
        names[xd] = weight.dims[wd]
    batch = tuple(weight.dims[d] for d in w_batch)
    free = _flat(names[d] for d in range(x.ndim) if d not in (*x_sum, *x_batch))
    (row,) = names[numbers.lhs_ragged_dimensions[0]]
    group = weight.dims[numbers.rhs_group_dimensions[0]]
    out = (*_flat(batch), *free, *_flat(weight.dims[d] for d in _w_free(weight, numbers)))
    return _Ragged(_flat(names), batch, free, row, group, out, weight.whole - {*group}, order)


def _part(
    eqn: Any, ragged: _Ragged, x: jax.Array, factors: Sequence[Operand], frozen: frozenset[int], sizes: jax.Array
) -> jax.Array:
    """One network's part of the result, product by product."""
    result = eqn.outvars[0].aval
    exact = {"precision": eqn.params["precision"]}
    wide = {"preferred_element_type": eqn.params["preferred_element_type"]}  # for the last product alone
    live = [(reshape(x, tuple(axis.size for axis in ragged.x)), ragged.x), *factors]
    if not any({*axes} & {*ragged.group} for _, axes in factors):
        # Groups that share all factors differ from rows of no group only.
        live = [(contract([*live, _members(ragged, sizes, x.dtype)], ragged.out, **exact, **wide), ragged.out)]
        frozen = frozenset()
    axes = tuple(ragged.even(axes) for _, axes in live)
    for i, j in ragged.order(axes, frozenset(ragged.even(ragged.out)), ragged.whole, frozen):
        right, left = live.pop(j), live.pop(i)
        options = exact if live else {**exact, **wide}
        kept = {*ragged.out, *_flat(axes for _, axes in live)}
        if i > 0:
            live.insert(i, _product([left, right], kept | {*ragged.group}, options))
        elif {*ragged.group}.isdisjoint(right[1]):
            live.insert(0, _product([left, right], kept, options))
        else:
            live.insert(0, _met(eqn, ragged, left, right, sizes, kept - {*ragged.group}, options))
    return reshape(contract(live, ragged.out), result.shape).astype(result.dtype)


def _met(
    eqn: Any, ragged: _Ragged, left: Operand, right: Operand, sizes: jax.Array, kept: set[Axis], options: dict[str, Any]
) -> Operand:
    """The product of an activation with a factor that each group has of its own."""
    shared, batch = {*left[1]} & {*right[1]}, _flat(ragged.batch)
    summed = tuple(axis for axis in left[1] if axis in shared - kept)
    if not summed or shared & kept - {*batch}:
        # Element by element along some axis: each row takes what it needs of the factor.
        return _product([left, right, _members(ragged, sizes, left[0].dtype)], kept, options)
    others = tuple(axis for axis in left[1] if axis in kept - {*batch, *ragged.free})
    new = tuple(axis for axis in right[1] if axis in kept - {*left[1], *batch})
    n = len(ragged.batch)
    rows = [*ragged.batch, *((axis,) for axis in ragged.free), *([others] if others else []), summed]
    numbers = lax.RaggedDotDimensionNumbers(
        (((len(rows) - 1,), (n + 1,)), (range(n), range(1, n + 1))), (n + ragged.free.index(ragged.row),), (0,)
    )
    params = {"ragged_dot_dimension_numbers": numbers, "out_sharding": None, "preferred_element_type": None, **options}
    y = eqn.primitive.bind(
        _array([left], rows),
        _array([right], [ragged.group, *ragged.batch, summed, new]),
        sizes,
        **{**eqn.params, **params},
    )
    axes = (*batch, *ragged.free, *others, *new)
    return reshape(y, tuple(axis.size for axis in axes)), axes


def _members(ragged: _Ragged, sizes: jax.Array, dtype: Any) -> Operand:
    """1 where a row is of a group; of a row beyond the last group, 0 for all."""
    ends = jnp.cumsum(sizes, -1)[..., None, :]
    rows = jnp.arange(ragged.row.size, dtype=sizes.dtype)[:, None]
    array = ((rows < ends) & (rows >= ends - sizes[..., None, :])).astype(dtype)
    outer = (*_flat(ragged.batch), *ragged.free[: ragged.free.index(ragged.row)]) if sizes.ndim > 1 else ()
    axes = (*outer, ragged.row, *ragged.group)
    return reshape(array, tuple(axis.size for axis in axes)), axes


def _product(operands: Sequence[Operand], kept: set[Axis], options: dict[str, Any]) -> Operand:
    axes = tuple(axis for axis in dict.fromkeys(_flat(axes for _, axes in operands)) if axis in kept)
    return contract(operands, axes, **options), axes


def _array(operands: Sequence[Operand], dims: Sequence[Axes]) -> jax.Array:
    """The product of operands as an array of dimensions that are made of axes."""
    return reshape(contract(operands, _flat(dims)), tuple(map(size_of, dims)))


def _flat(groups: Iterable[Axes]) -> Axes:
    return tuple(axis for group in groups for axis in group)

"""Products with a weight: dot_general in every arrangement, and element-wise scaling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.contract import Axes, Axis, contract, reshape, size_of
from lora_jax.factored import Factored, is_factored
from lora_jax.lift import Interpreter, rule


@rule("dot_general")
def dot_general(interpreter: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
    """x·(W + ΔW) = x·W + einsum(x, factors): the activation's dimensions take the names of the axes they meet."""
    lhs, rhs = interpreter.one_of_two(eqn, lhs, rhs)
    if is_factored(lhs) and is_factored(rhs):
        return NotImplemented
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    x: Any
    if is_factored(lhs):
        weight, x, w_sum, x_sum, w_batch, x_batch = lhs, rhs, lhs_sum, rhs_sum, lhs_batch, rhs_batch
    else:
        weight, x, w_sum, x_sum, w_batch, x_batch = rhs, lhs, rhs_sum, lhs_sum, rhs_batch, lhs_batch
    w_free = [d for d in range(weight.ndim) if d not in (*w_sum, *w_batch)]
    x_free = [d for d in range(x.ndim) if d not in (*x_sum, *x_batch)]

    names: list[Axes] = [(Axis(f"x{d}", size),) for d, size in enumerate(x.shape)]
    for xd, wd in (*zip(x_sum, w_sum, strict=True), *zip(x_batch, w_batch, strict=True)):
        names[xd] = weight.dims[wd]
    batch, summed = _flat(weight.dims[d] for d in w_batch), _flat(weight.dims[d] for d in w_sum)
    x_out, w_out = _flat(names[d] for d in x_free), _flat(weight.dims[d] for d in w_free)
    interpreter.record(weight, eqn, "linear", summed, w_out)

    out = eqn.outvars[0].aval
    x_axes = _flat(names)
    y: Any = jnp.zeros(out.shape, out.dtype) if not weight.terms else None
    for term in weight.terms:
        if len(term.operands) > 1:
            # In low-rank products the activation is flattened to two dimensions: XLA's CPU back end is slow at skinny
            # products of more. The plain product with the base leaves it in the shape it has.
            x_axes, x_out = _merged(x_axes, x_out)
        part = contract(
            [(reshape(x, tuple(axis.size for axis in x_axes)), x_axes), *term.at(weight.dtype)],
            (*batch, *w_out, *x_out) if is_factored(lhs) else (*batch, *x_out, *w_out),
            whole=weight.whole,
            precision=eqn.params["precision"],
            preferred_element_type=eqn.params["preferred_element_type"],
        )
        part = reshape(part.astype(out.dtype), out.shape)
        y = part if y is None else y + part
    return y


def _merged(axes: Axes, free: Axes) -> tuple[Axes, Axes]:
    """The axes of an activation, and those that the product has of it, with the latter made one where they adjoin."""
    start = axes.index(free[0]) if free else 0
    if len(free) < 2 or axes[start : start + len(free)] != free:
        return axes, free
    one = (Axis("x", size_of(free)),)
    return axes[:start] + one + axes[start + len(free) :], one


@rule("mul")
def mul(interpreter: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """Scaling by a number, or by a vector along some dimensions: it joins each network as one more factor."""
    left, right = interpreter.one_of_two(eqn, left, right)
    weight, other = (left, right) if is_factored(left) else (right, left)
    return NotImplemented if is_factored(other) else _scale(weight, jnp.asarray(other), eqn)


@rule("div")
def div(_: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """Division by a number or a vector, as scaling by its inverse."""
    if not is_factored(left) or is_factored(right) or not jnp.issubdtype(left.dtype, jnp.floating):
        return NotImplemented
    return _scale(left, 1 / jnp.asarray(right), eqn)


@rule("neg")
def neg(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Scaling by -1."""
    return _scale(weight, jnp.asarray(-1, weight.dtype), eqn)


def _scale(weight: Factored, array: jax.Array, eqn: Any) -> Any:
    """The weight times a number, or times an array that has some of its dimensions but not all."""
    along = [d for d in range(array.ndim) if array.shape[d] != 1]
    if eqn.outvars[0].aval.shape != weight.shape or (along and weight.size == array.size):
        return NotImplemented
    axes = _flat(weight.dims[d] for d in along)
    return weight.times(reshape(array, tuple(axis.size for axis in axes)), axes)


def _flat(groups: Any) -> Axes:
    return tuple(axis for group in groups for axis in group)

"""Products with a weight: dot_general in every arrangement, and element-wise scaling."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.contract import Axes, Axis, contract, reshape
from lora_jax.factored import Factored, is_factored
from lora_jax.lift import Interpreter, rule


@rule("dot_general")
def dot_general(interpreter: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
    """x·(W + ΔW) = x·W + einsum(x, factors): the activation's dimensions take the names of the axes they meet."""
    if is_factored(lhs) and is_factored(rhs):
        return NotImplemented
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    if is_factored(lhs):
        weight, x, w_sum, x_sum, w_batch, x_batch = lhs, rhs, lhs_sum, rhs_sum, lhs_batch, rhs_batch
    else:
        weight, x, w_sum, x_sum, w_batch, x_batch = rhs, lhs, rhs_sum, lhs_sum, rhs_batch, lhs_batch
    w_free = [d for d in range(weight.ndim) if d not in (*w_sum, *w_batch)]
    x_free = [d for d in range(x.ndim) if d not in (*x_sum, *x_batch)]

    names: list[Axes] = [(Axis(f"x{d}", size),) for d, size in enumerate(x.shape)]
    for xd, wd in (*zip(x_sum, w_sum, strict=True), *zip(x_batch, w_batch, strict=True)):
        names[xd] = weight.dims[wd]
    x_axes = _flat(names)
    batch, summed = _flat(weight.dims[d] for d in w_batch), _flat(weight.dims[d] for d in w_sum)
    x_out, w_out = _flat(names[d] for d in x_free), _flat(weight.dims[d] for d in w_free)
    interpreter.record(weight, eqn, "linear", summed, w_out)

    out_axes = (*batch, *w_out, *x_out) if is_factored(lhs) else (*batch, *x_out, *w_out)
    x = reshape(x, tuple(axis.size for axis in x_axes))
    out = eqn.outvars[0].aval
    products = functools.partial(
        contract,
        out=out_axes,
        whole=frozenset(weight.axes),
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
    )
    # The base's product leaves the activation in the shape it has. In the low-rank products it is flattened to two
    # dimensions: XLA's CPU back end is slow at skinny products of more (GPT-2's shapes: 1.9 times a full step, not 0.7).
    terms = [
        products([(x, x_axes), *term.at(weight.dtype)], flat=len(term.operands) > 1).astype(out.dtype)
        for term in weight.terms
    ]
    return reshape(functools.reduce(jnp.add, terms), out.shape)


@rule("mul")
def mul(_: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """Scaling by a number, or by a vector along some dimensions: it joins each network as one more factor."""
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
    """The weight times an array whose dimensions are the weight's, or 1; one that is as large as the weight is none."""
    if eqn.outvars[0].aval.shape != weight.shape:
        return NotImplemented
    along = [d for d in range(array.ndim) if array.shape[d] != 1]
    axes = _flat(weight.dims[d] for d in along)
    if axes and set(axes) == set(axis for axis in weight.axes if axis.size > 1) and len(along) > 1:
        return NotImplemented
    return weight.times(reshape(array, tuple(axis.size for axis in axes)), axes)


def _flat(groups: Any) -> Axes:
    return tuple(axis for group in groups for axis in group)

"""Arithmetic on a weight, element by element: scaling joins the networks as a factor, a sum as another network."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import joint
from lora_jax.contract import contract
from lora_jax.contract import reshape as reshaped
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.network import Network
from lora_jax.order import order
from lora_jax.rules.layout import broadcast

WITHOUT_LEAD = functools.partial(order, lead=False)


@rule("mul")
def mul(interpreter: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """A number, or a vector along some dimensions, joins each network as one more factor; so does another weight."""
    if is_factored(left) and is_factored(right):
        left, right = _vectors_formed(interpreter, eqn, left, right)
    if is_factored(left) and is_factored(right):
        return _product(left, right)
    weight, other = (left, right) if is_factored(left) else (right, left)
    return _scaled(weight, interpreter.narrow(other), eqn)


@rule("div")
def div(interpreter: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """Division by a number or a vector, as scaling by its inverse."""
    if is_factored(left) and is_factored(right) and right.is_vector:
        right = interpreter.form(right, eqn)
    if not is_factored(left) or is_factored(right) or not jnp.issubdtype(left.dtype, jnp.floating):
        return NotImplemented
    return _scaled(left, 1 / interpreter.narrow(right), eqn)


@rule("neg")
def neg(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """Scaling by -1."""
    return _scaled(weight, jnp.asarray(-1, weight.dtype), eqn)


@rule("square", "integer_pow")
def square(_: Interpreter, eqn: Any, weight: Factored) -> Any:
    """W∘W, for the sums that norms and variances are made of."""
    return NotImplemented if eqn.params.get("y", 2) != 2 else _product(weight, weight)


@rule("add", "add_any")
def add(interpreter: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """What varies along some dimensions only is one more network; a whole array is added to the base."""
    if is_factored(left) and is_factored(right):
        left, right = _vectors_formed(interpreter, eqn, left, right)
    if is_factored(left) and is_factored(right):
        if left.mixed or right.mixed:
            return NotImplemented
        return _or_not(joint.add(left, right))
    weight, other = (left, right) if is_factored(left) else (right, left)
    return _shifted(weight, interpreter.narrow(other), eqn)


@rule("sub")
def sub(interpreter: Interpreter, eqn: Any, left: Any, right: Any) -> Any:
    """Addition of what is negated."""
    if is_factored(right):
        right = _scaled_by(right, jnp.asarray(-1, right.dtype), ())
    else:
        right = -interpreter.narrow(right)
    return add(interpreter, eqn, left, right)


@rule("reduce_sum")
def reduce_sum(interpreter: Interpreter, eqn: Any, weight: Factored) -> Any:
    """A sum over dimensions is a contraction of each network, which forms nothing.

    Where some factor has all dimensions that are left, or one is left, the result is an array; or else a weight.
    """
    gone, out = eqn.params["axes"], eqn.outvars[0].aval
    if weight.mixed or weight.is_vector:
        return NotImplemented
    dims = tuple(group for d, group in enumerate(weight.dims) if d not in gone)
    summed = tuple(axis for d in gone for axis in weight.dims[d])
    value = dataclasses.replace(weight.each(lambda network: joint.all_carrying(network, summed)), dims=dims)
    left = frozenset(axis for axis in value.axes if axis.size > 1)
    small = len(left) <= 1 or any(left.issubset(axes) for delta in value.deltas for axes in delta.axes)
    if weight.whole.isdisjoint(summed) or not (small or weight.is_product):
        return dataclasses.replace(value, base=value.base and joint.dense(joint.base_of(value), dims))
    axes = [tuple(a for a in term.axes) for term in value.terms]
    if any(len(a) > 1 and not WITHOUT_LEAD(tuple(a), frozenset(value.axes), weight.whole) for a in axes):
        return NotImplemented
    interpreter.record(weight, eqn, "sum")
    terms = [
        contract(t.at(out.dtype), value.axes, whole=weight.whole, frozen=t.frozen, order=WITHOUT_LEAD)
        for t in value.terms
    ]
    return reshaped(functools.reduce(jnp.add, terms, jnp.zeros((), out.dtype)), out.shape)


def _product(left: Factored, right: Factored) -> Any:
    if left.mixed or right.mixed or left.is_product or right.is_product:
        return NotImplemented
    return _or_not(joint.multiply(left, right))


def _vectors_formed(interpreter: Interpreter, eqn: Any, left: Factored, right: Factored) -> tuple[Any, Any]:
    """Two weights, of which one that is a vector where the other is a matrix is formed."""
    if left.is_vector == right.is_vector:
        return left, right
    return (interpreter.form(left, eqn), right) if left.is_vector else (left, interpreter.form(right, eqn))


def _scaled(weight: Factored, array: jax.Array, eqn: Any) -> Any:
    """The weight times a number, or times an array that has some of its dimensions but not all."""
    weight = _grown(weight, eqn)
    along = _along(weight, array, eqn)
    return NotImplemented if along is None else _scaled_by(weight, array, along)


def _scaled_by(weight: Factored, array: jax.Array, along: tuple[int, ...]) -> Factored:
    axes = tuple(axis for d in along for axis in weight.dims[d])
    return weight.times(reshaped(array, tuple(axis.size for axis in axes)), axes)


def _shifted(weight: Factored, array: jax.Array, eqn: Any) -> Any:
    """The weight plus an array."""
    weight = _grown(weight, eqn)
    along = _along(weight, array, eqn)
    if along is not None:
        axes = tuple(axis for d in along for axis in weight.dims[d])
        vector = reshaped(array.astype(weight.dtype), tuple(axis.size for axis in axes))
        return dataclasses.replace(weight, deltas=(*weight.deltas, Network((vector,), (axes,))))
    if eqn.outvars[0].aval.shape != weight.shape or weight.is_vector or weight.is_broadcast:
        return NotImplemented
    weight = weight.without_units()
    base = lax.add(joint.base_of(weight), jnp.broadcast_to(array, weight.shape))
    return dataclasses.replace(weight, base=joint.dense(base, weight.dims), mixed=True)


def _grown(weight: Factored, eqn: Any) -> Factored:
    """The weight with its dims of size 1 broadcast to those of the result."""
    shape = eqn.outvars[0].aval.shape
    return weight if shape == weight.shape else broadcast(weight, shape, range(len(shape)))


def _along(weight: Factored, array: jax.Array, eqn: Any) -> tuple[int, ...] | None:
    """The dimensions that an array varies along, if those are not all of the weight's and the result is its like."""
    along = tuple(d for d in range(array.ndim) if array.shape[d] != 1)
    if eqn.outvars[0].aval.shape != weight.shape or (along and weight.size == array.size):
        return None
    return along


def _or_not(value: Factored | None) -> Any:
    return NotImplemented if value is None else value

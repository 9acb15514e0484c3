"""Products with a weight: dot_general in every arrangement."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import compat
from lora_jax.axes import Axes, Axis, size_of
from lora_jax.contract import contract, reshape
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.joint import dense, matmul
from lora_jax.materialize import cost_of, materialize
from lora_jax.network import Network, after_lead
from lora_jax.order import Cost, Order, letters, work


@rule("dot_general")
def dot_general(interpreter: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
    """x·(W + ΔW) = x·W + einsum(x, factors): the activation's dimensions take the names of the axes they meet."""
    if is_factored(lhs) and is_factored(rhs):
        for value in (lhs, rhs):
            if value.is_vector or value.mixed:
                array = interpreter.form(value, eqn)
                return dot_general(interpreter, eqn, *(array if x is value else x for x in (lhs, rhs)))
        return _of_two_weights(interpreter, eqn, lhs, rhs)
    (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    x: Any
    if is_factored(lhs):
        weight, x, w_sum, x_sum, w_batch, x_batch = lhs, rhs, lhs_sum, rhs_sum, lhs_batch, rhs_batch
    else:
        weight, x, w_sum, x_sum, w_batch, x_batch = rhs, lhs, rhs_sum, lhs_sum, rhs_batch, lhs_batch
    if weight.is_product:
        return NotImplemented
    w_free = [d for d in range(weight.ndim) if d not in (*w_sum, *w_batch)]
    x_free = [d for d in range(x.ndim) if d not in (*x_sum, *x_batch)]

    names: list[Axes] = [(Axis(f"x{d}", size),) for d, size in enumerate(x.shape)]
    for xd, wd in (*zip(x_sum, w_sum, strict=True), *zip(x_batch, w_batch, strict=True)):
        names[xd] = weight.dims[wd]
    batch, summed = _flat(weight.dims[d] for d in w_batch), _flat(weight.dims[d] for d in w_sum)
    x_out, w_out = _flat(names[d] for d in x_free), _flat(weight.dims[d] for d in w_free)
    out = (*batch, *w_out, *x_out) if is_factored(lhs) else (*batch, *x_out, *w_out)
    product = Product(
        x_axes=_flat(names),
        x_out=x_out,
        out=out,
        whole=weight.whole,
        order=interpreter.plan.order,
        precision=eqn.params["precision"],
        preferred_element_type=eqn.params["preferred_element_type"],
        dtype=weight.dtype,
        result=(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype),
    )
    cost, forming = product.cost(weight), cost_of(weight).low_rank
    plain = not weight.is_broadcast and not any(term.dropout for term in weight.terms)
    if plain and interpreter.plan.forms(forming, cost.low_rank):
        interpreter.record(weight, eqn, "linear", summed, w_out, Cost(cost.base, forming, "x·(W + ΔW)"))
        return _hybrid(x, weight, product)
    interpreter.record(weight, eqn, "linear", summed, w_out, cost)
    return _multiply(x, weight.terms, product)


def _of_two_weights(interpreter: Interpreter, eqn: Any, left: Factored, right: Factored) -> Any:
    """W·V is a weight again: its base is the product of the bases, and each other product has small factors."""
    (l_sum, r_sum), (l_batch, r_batch) = eqn.params["dimension_numbers"]
    if left.is_product or right.is_product:
        return NotImplemented

    def bases(a: jax.Array, b: jax.Array) -> jax.Array:
        return eqn.primitive.bind(a, b, **eqn.params)

    value = matmul(left, right, [*zip(l_batch, r_batch, strict=True)], [*zip(l_sum, r_sum, strict=True)], bases)
    if value is None:
        return NotImplemented
    # What it costs is that of the bases; products of factors are made where the value meets an activation.
    cost = Cost(2 * value.size * math.prod(left.shape[d] for d in l_sum), 0, "W·V")
    for side, other, summed, batch in ((left, False, l_sum, l_batch), (right, True, r_sum, r_batch)):
        inner = _flat(side.dims[d] for d in summed)
        outer = _flat(side.dims[d] for d in range(side.ndim) if d not in (*summed, *batch))
        sides = (inner, outer) if other else (outer, inner)
        interpreter.record(side, eqn, "linear", *sides, Cost() if other else cost)
    return value


@dataclasses.dataclass(frozen=True)
class Product:
    """All that is static about the product of an activation and a weight.

    Attributes:
      x_axes: The axes of the activation, of which `x_out` are not summed over.
      x_out: Those axes.
      out: The axes of the result.
      whole: The axes of the weight.
      order: What chooses the contraction order.
      precision: As in `jax.lax.dot_general`.
      preferred_element_type: As in `jax.lax.dot_general`.
      dtype: The dtype that is multiplied in.
      result: The shape and dtype of the result.
    """

    x_axes: Axes
    x_out: Axes
    out: Axes
    whole: frozenset[Axis]
    order: Callable[..., Order]
    precision: Any
    preferred_element_type: Any
    dtype: Any
    result: tuple[tuple[int, ...], Any]

    def with_x_flat(self) -> Product:
        """The same with the axes that the result has of the activation made one, where they adjoin."""
        start = self.x_axes.index(self.x_out[0]) if self.x_out else 0
        stop = start + len(self.x_out)
        at = self.out.index(self.x_out[0]) if self.x_out else 0
        if len(self.x_out) < 2 or self.x_axes[start:stop] != self.x_out:
            return self
        one = (Axis("x", size_of(self.x_out)),)
        return dataclasses.replace(
            self,
            x_axes=self.x_axes[:start] + one + self.x_axes[stop:],
            x_out=one,
            out=self.out[:at] + one + self.out[at + len(self.x_out) :],
        )

    def cost(self, weight: Factored) -> Cost:
        """What it costs with a weight's base, and with its factors."""
        base, low_rank = 0, 0
        words = []
        for term in weight.terms:
            names = ("W", *letters(len(term.axes))) if term is weight.base else letters(len(term.axes))
            axes = (self.x_axes, *term.axes)
            flops, word = work(axes, self.out, ("x", *names)[: len(axes)], self.whole, after_lead(term), self.order)
            if term is weight.base:
                base += flops
            else:
                low_rank += flops
                words.append(word)
        return Cost(base, low_rank, " + ".join(words))


@functools.partial(jax.jit, static_argnums=2)
def _multiply(x: jax.Array, terms: tuple[Network, ...], product: Product) -> jax.Array:
    """The sum of an activation's products with each network. Jitted, so that layers of one form are traced once."""
    shape, dtype = product.result
    split = compat.over_devices((x, terms))
    y: Any = None if terms else jnp.zeros(shape, dtype)
    for term in terms:
        # In low-rank products the activation is flattened to two dimensions: XLA's CPU back end is slow at skinny
        # products of more. The plain product with the base leaves it in the shape it has, as do all on a mesh: an axis
        # made of two, such as batch and sequence, cannot be split along both, and so would be gathered.
        how = product.with_x_flat() if len(term.operands) > 1 and not split else product
        activation, axes = term.drop(x, how.x_axes)
        activation = reshape(activation, tuple(axis.size for axis in axes))
        part = contract(
            [(activation, axes), *term.at()],
            how.out,
            whole=how.whole,
            frozen=after_lead(term),
            order=how.order,
            dtype=how.dtype,
            precision=how.precision,
            preferred_element_type=how.preferred_element_type,
        )
        part = reshape(part.astype(dtype), shape)
        y = part if y is None else y + part
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _hybrid(x: jax.Array, weight: Factored, product: Product) -> jax.Array:
    """The product with W + ΔW formed, whose gradient by the factors is that of `_multiply`."""
    return _hybrid_forward(x, weight, product)[0]


def _hybrid_forward(x: jax.Array, weight: Factored, product: Product) -> tuple[jax.Array, Any]:
    formed = (dense(materialize(weight), weight.dims),)
    return _multiply(x, formed, product), (x, weight, formed)


def _hybrid_backward(product: Product, saved: Any, dy: jax.Array) -> tuple[jax.Array, Factored]:
    x, weight, formed = saved
    _, of_x = jax.vjp(lambda x: _multiply(x, formed, product), x)
    _, of_weight = jax.vjp(lambda weight: _multiply(x, weight.terms, product), weight)
    return *of_x(dy), *of_weight(dy)


_hybrid.defvjp(_hybrid_forward, _hybrid_backward)


def _flat(groups: Any) -> Axes:
    return tuple(axis for group in groups for axis in group)

"""Convolutions: A is a kernel of the same window with few output channels, B then mixes those channels."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.contract import Axis, contract, reshape, size_of
from lora_jax.factored import Factored, Network, is_factored, total
from lora_jax.lift import Interpreter, rule


@rule("conv_general_dilated")
def conv_general_dilated(interpreter: Interpreter, eqn: Any, x: Any, kernel: Any) -> Any:
    """conv(x, W + ΔW) = conv(x, W) + conv(x, A)·B, for any layout, window, stride, padding and dilation."""
    grouped = eqn.params["feature_group_count"] * eqn.params["batch_group_count"] > 1
    if is_factored(x) or grouped:
        return NotImplemented
    numbers = eqn.params["dimension_numbers"]
    out_dim, *in_dims = numbers.rhs_spec
    outer = frozenset(kernel.dims[out_dim])
    inner = frozenset(axis for d in in_dims for axis in kernel.dims[d])
    if any(inner & {*axes} and outer & {*axes} for delta in kernel.deltas for axes in delta.axes):
        return NotImplemented
    interpreter.record(kernel, eqn, "conv", tuple(inner), tuple(outer))
    base = total(dataclasses.replace(kernel, deltas=()))
    y = eqn.primitive.bind(x, base, **eqn.params)
    return functools.reduce(jnp.add, [_low_rank(eqn, x, kernel, delta, inner) for delta in kernel.deltas], y)


def _low_rank(eqn: Any, x: jax.Array, kernel: Factored, delta: Network, inner: frozenset[Axis]) -> jax.Array:
    """One convolution with the factors of window and input channels, then a product with those that are left."""
    numbers = eqn.params["dimension_numbers"]
    out_dim, *_ = numbers.rhs_spec
    operands = delta.at(kernel.dtype)
    window = [operand for operand in operands if inner & {*operand[1]}]
    mix = [operand for operand in operands if not inner & {*operand[1]}]
    named = frozenset(axis for _, axes in mix for axis in axes)
    ranks = tuple(sorted({axis for _, axes in window for axis in axes if axis in named}))
    dims = [ranks if d == out_dim else group for d, group in enumerate(kernel.dims)]
    small = contract(window, tuple(axis for group in dims for axis in group))
    small = reshape(small, tuple(size_of(group) for group in dims))
    y = eqn.primitive.bind(x, small, **{**eqn.params, "preferred_element_type": None})
    feature = numbers.out_spec[1]
    places = [(Axis(f"y{d}", size),) for d, size in enumerate(y.shape)]
    y_axes = [ranks if d == feature else place for d, place in enumerate(places)]
    out_axes = [kernel.dims[out_dim] if d == feature else place for d, place in enumerate(places)]
    y = reshape(y, tuple(axis.size for group in y_axes for axis in group))
    flat_in, flat_out = (tuple(axis for group in axes for axis in group) for axes in (y_axes, out_axes))
    out = eqn.outvars[0].aval
    product = contract([(y, flat_in), *mix], flat_out, precision=eqn.params["precision"])
    return reshape(product, out.shape).astype(out.dtype)

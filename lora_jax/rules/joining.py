"""Weights put together: concatenated, padded, chosen between."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax import joint
from lora_jax.blocks import concatenate as concatenated
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.rules.indexing import along


@rule("concatenate")
def concatenate(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Such as a fused query, key and value of three leaves, or layers stacked to be scanned over."""
    values = _values(interpreter, eqn, operands)
    value = values and concatenated(values, eqn.params["dimension"])
    return NotImplemented if value is None else value


@rule("stack")
def stack(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Concatenation along a new dim."""
    axis = eqn.params["axis"]
    values = _values(interpreter, eqn, operands)
    values = values and [dataclasses.replace(x, dims=(*x.dims[:axis], (), *x.dims[axis:])) for x in values]
    value = values and concatenated(values, axis)
    return NotImplemented if value is None else value


@rule("select_n")
def select_n(interpreter: Interpreter, eqn: Any, which: Any, *cases: Any) -> Any:
    """One of several weights, as a number says, or as many along some of their dimensions, such as stacked layers."""
    if is_factored(which):
        return NotImplemented
    which = interpreter.narrow(which)
    which = which.reshape((1,) * len(eqn.outvars[0].aval.shape)) if which.ndim == 0 else which
    values = _values(interpreter, eqn, cases)
    if values is None or sum(size > 1 for size in which.shape) >= sum(size > 1 for size in values[0].shape):
        return NotImplemented
    value = joint.choose(which, values)
    return NotImplemented if value is None else value


@rule("pad")
def pad(_: Interpreter, eqn: Any, weight: Any, value: Any) -> Any:
    """Entries added around and between, or taken away: what is added to ΔW is zero."""
    if not is_factored(weight) or is_factored(value):
        return NotImplemented
    config = eqn.params["padding_config"]
    base = lax.pad(joint.base_of(weight), value, config)
    for d, amounts in enumerate(config):
        if amounts == (0, 0, 0):
            continue
        weight = weight.fused(d)
        if weight is None or not weight.dims[d]:
            return NotImplemented
        (axis,) = weight.dims[d]
        weight = weight.each(lambda network, axis=axis: joint.all_carrying(network, [axis]))
        new = dataclasses.replace(axis, size=base.shape[d])

        def grown(array: Any, dim: int, amounts: Any = amounts) -> Any:
            around = [amounts if d == dim else (0, 0, 0) for d in range(array.ndim)]
            return lax.pad(array, jnp.zeros((), array.dtype), around)

        weight = along(weight, axis, (new,), grown)
    return dataclasses.replace(weight, base=joint.dense(base, weight.dims))


def _values(interpreter: Interpreter, eqn: Any, operands: Sequence[Any]) -> list[Factored] | None:
    """Operands as values of the same kind; None where there is nothing to keep apart."""
    weights = [x for x in operands if is_factored(x)]
    arrays = len(weights) < len(operands)
    if all(x.is_vector for x in weights) or any(x.is_product or (arrays and x.is_broadcast) for x in weights):
        return None
    formed = [interpreter.form(x, eqn) if is_factored(x) and x.is_vector else x for x in operands]
    values = [x if is_factored(x) else joint.plain(x) for x in formed]
    return [dataclasses.replace(x, mixed=x.mixed or not x.paths) for x in values]

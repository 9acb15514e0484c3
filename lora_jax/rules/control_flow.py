"""Calls, branches, loops and checkpoints: traced anew, with the Factored values' arrays as plain arguments.

A Factored value is a pytree whose names are static, so each rule is JAX's own transform of the interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import compat
from lora_jax.contract import Axes, Axis
from lora_jax.factored import Factored, Network, is_factored
from lora_jax.lift import Interpreter, rule


@rule("jit", "pjit")
def jit(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """A call stays a call, under its name and the shardings it was given."""

    def call(*args: Any) -> list[Any]:
        constrained = _constrain(args, eqn.params["in_shardings"])
        with interpreter.called_at(eqn):
            results = interpreter.evaluate(eqn.params["jaxpr"], *constrained)
        return _constrain(results, eqn.params["out_shardings"])

    call.__name__ = eqn.params["name"]
    return jax.jit(call)(*operands)


@rule("remat", "remat2", "checkpoint")
def checkpoint(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """Rematerialization keeps its policy."""
    body = functools.partial(interpreter.evaluate, eqn.params["jaxpr"])
    return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*operands)


@rule("cond")
def cond(interpreter: Interpreter, eqn: Any, index: Any, *operands: Any) -> Any:
    """Each branch is interpreted; a weight that is chosen by the condition itself has no factored form."""
    branches = eqn.params["branches"]
    if any(name != "branches" for name in eqn.params):
        return NotImplemented
    index = interpreter.form(index, eqn) if is_factored(index) else index
    plain = [functools.partial(_arrays, interpreter, eqn, branch) for branch in branches]
    return lax.switch(index, plain, *operands)


@rule("while")
def while_loop(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Weights that the loop reads are its constants; one that it carries has no factored form."""
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, consts, carry = operands[:a], operands[a : a + b], operands[a + b :]
    carry = [interpreter.form(x, eqn) if is_factored(x) else x for x in carry]
    return lax.while_loop(
        lambda carry: interpreter.evaluate(eqn.params["cond_jaxpr"], *tests, *carry)[0],
        lambda carry: _arrays(interpreter, eqn, eqn.params["body_jaxpr"], *consts, *carry),
        carry,
    )


@rule("scan")
def scan(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Weights may be constants, or scanned over: then each operand that carries the leading axis is."""
    a, b = compat.scan_counts(eqn.params)
    consts, carry, xs = operands[:a], operands[a : a + b], operands[a + b :]
    carry = [interpreter.form(x, eqn) if is_factored(x) else x for x in carry]
    xs = [interpreter.form(x, eqn) if is_factored(x) and len(x.dims[0]) > 1 else x for x in xs]

    def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        sliced = [
            interpreter.settled(_row(x, y), x, eqn) if is_factored(x) else y for x, y in zip(xs, rows, strict=True)
        ]
        out = interpreter.evaluate(eqn.params["jaxpr"], *consts, *carry, *sliced)
        return [interpreter.form(y, eqn) if is_factored(y) else y for y in out[:b]], out[b:]

    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, carry, [_stack(x) if is_factored(x) else x for x in xs], **params)
    return [*carry, *(_restacked(y, eqn.params["length"]) if is_factored(y) else y for y in ys)]


def _stack(weight: Factored) -> list[jax.Array | None]:
    """What a scan takes slices of: each operand that carries the leading axis, with that axis first."""
    lead = weight.dims[0]
    return [
        jnp.moveaxis(array, axes.index(lead[0]), 0) if lead and lead[0] in axes else None
        for term in weight.terms
        for array, axes in zip(term.operands, term.axes, strict=True)
    ]


def _row(weight: Factored, rows: list[jax.Array | None]) -> Factored:
    """One slice of a stacked weight: slices of what `_stack` gives, and all other operands as they are."""
    lead, slices = weight.dims[0], iter(rows)

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        row = next(slices)
        return (array, axes) if row is None else (row, tuple(axis for axis in axes if axis not in lead))

    return dataclasses.replace(weight.map(change), dims=weight.dims[1:])


def _restacked(rows: Factored, length: int) -> Factored:
    """What a scan makes of a weight that its body returns: every operand has a new leading axis."""
    taken = {axis.name for term in rows.terms for axes in term.axes for axis in axes}
    lead = Axis(next(name for i in range(len(taken) + 1) if (name := f"stack{i}") not in taken), length)
    stacked = rows.map(lambda array, axes: (array, (lead, *axes)))
    return dataclasses.replace(stacked, dims=((lead,), *rows.dims))


@rule("custom_jvp_call")
def custom_jvp(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """The author's derivative stays in force: the tangent of W + AB is factored too, dA·B + A·dB."""

    @jax.custom_jvp
    def call(*operands: Any) -> list[Any]:
        return _arrays(interpreter, eqn, eqn.params["call_jaxpr"], *operands)

    def jvp(primals: Any, tangents: Any) -> Any:
        consts = eqn.params["num_consts"]
        pairs = list(zip(primals, tangents, strict=True))[consts:]
        moved = [_tangent(x, dx) if is_factored(x) else compat.instantiate(dx) for x, dx in pairs]
        jaxpr, out_zeros = compat.jvp_jaxpr(eqn, len(moved))
        out = _arrays(interpreter, eqn, jaxpr, *(x for x, _ in pairs), *moved)
        n, nonzero = len(out_zeros), iter(out[len(out_zeros) :])
        return out[:n], [jnp.zeros_like(y) if zero else next(nonzero) for y, zero in zip(out, out_zeros, strict=False)]

    call.defjvp(jvp, symbolic_zeros=True)
    return call(*operands)


def _tangent(weight: Factored, tangent: Factored) -> Factored:
    """The product rule: one network for each operand that moves, with all others held."""

    def moved(held: Network, moves: Network) -> list[Network]:
        return [
            dataclasses.replace(held, operands=(*held.operands[:i], array, *held.operands[i + 1 :]))
            for i, array in enumerate(moves.operands)
            if not compat.is_zero(array)
        ]

    base = moved(weight.base, tangent.base) if weight.base and tangent.base else []
    deltas = [d for held, moves in zip(weight.deltas, tangent.deltas, strict=True) for d in moved(held, moves)]
    if len(base) > 1:
        base, deltas = [], base + deltas
    return dataclasses.replace(weight, base=base[0] if base else None, deltas=tuple(deltas))


def _arrays(interpreter: Interpreter, eqn: Any, jaxpr: Any, *operands: Any) -> list[Any]:
    """The results of a jaxpr as arrays, as branches and loop bodies must return them."""
    return [interpreter.form(y, eqn) if is_factored(y) else y for y in interpreter.evaluate(jaxpr, *operands)]


def _constrain(values: Any, shardings: Any) -> list[Any]:
    """The values with those shardings imposed that were given."""
    return [
        lax.with_sharding_constraint(x, s) if isinstance(s, jax.sharding.Sharding) and not is_factored(x) else x
        for x, s in zip(values, shardings, strict=True)
    ]

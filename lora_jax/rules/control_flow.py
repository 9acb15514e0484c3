"""Calls, branches, loops and checkpoints: traced anew, with the Factored values' arrays as plain arguments.

A Factored value is a pytree whose names are static, so each rule is JAX's own transform of the interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import compat, joint
from lora_jax.axes import Axes, Axis
from lora_jax.explicit import own_sharding, sharded_alike, under_automatic_axes
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter, rule
from lora_jax.network import Network
from lora_jax.rules.sharding import constrained, imposed


@rule("jit", "pjit", typed=True)
def jit(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """A call stays a call, under its name and the shardings it was given."""
    name, before, after = (eqn.params[key] for key in ("name", "in_shardings", "out_shardings"))

    def transform(body: Any) -> Any:
        def call(*args: Any) -> list[Any]:
            return _constrained(body(*_constrained(args, before)), after)

        call.__name__ = name
        return jax.jit(call)

    return interpreter.call(eqn, transform, (name, before, after), *operands)


@rule("closed_call", "core_call", "eval_jaxpr", typed=True)
def inline(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """A body that JAX wrote into an equation, such as of a loop that a checkpoint runs again, is read in its place."""
    return interpreter.evaluate(eqn.params["call_jaxpr"], *operands)


@rule("remat", "remat2", "checkpoint", typed=True)
def checkpoint(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """Rematerialization keeps its policy."""
    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    transform = functools.partial(jax.checkpoint, policy=policy, prevent_cse=prevent_cse)
    return interpreter.call(eqn, transform, (policy, prevent_cse), *operands)


@rule("cond", typed=True)
def cond(interpreter: Interpreter, eqn: Any, index: Any, *operands: Any) -> Any:
    """Each branch is interpreted; of weights that all branches return, one is chosen factor by factor."""
    branches = eqn.params["branches"]
    if any(name != "branches" for name in eqn.params):
        return NotImplemented
    index = interpreter.form(index, eqn) if is_factored(index) else index
    weights = _weights_of(interpreter, index, branches, operands)
    if weights:
        others = [i not in weights for i in range(len(eqn.outvars))]
        branches = [compat.with_results(branch, others) for branch in branches]
    arrays = [functools.partial(interpreter.arrays, eqn, branch) for branch in branches]
    rest = iter(lax.switch(index, arrays, *operands))
    return [weights[i] if i in weights else next(rest) for i in range(len(eqn.outvars))]


def _weights_of(interpreter: Interpreter, index: Any, branches: Any, operands: Any) -> dict[int, Factored]:
    """Those results of a branch that are weights in every branch, by position, as one choice each."""
    before = len(interpreter.uses)
    abstract = [jax.eval_shape(functools.partial(interpreter.evaluate, branch), *operands) for branch in branches]
    del interpreter.uses[before:]
    # What a branch leaves empty, since a derivative reads it in another branch alone, may be anything.
    empty = [compat.placeholders(branch) for branch in branches]
    wanted = [
        all(map(is_factored, real)) and bool(real)
        for real in (
            [y for y, e in zip(ys, es, strict=True) if not e] for ys, es in zip(_t(abstract), _t(empty), strict=True)
        )
    ]
    if not any(wanted) or any(compat.parts(branch)[0].effects for branch in branches):
        return {}
    found = [interpreter.evaluate(compat.with_results(branch, wanted), *operands) for branch in branches]
    which = jnp.clip(index, 0, len(branches) - 1).astype(jnp.int32)
    weights = {}
    for i, ys in zip([i for i, yes in enumerate(wanted) if yes], _t(found), strict=True):
        first = next(filter(is_factored, ys))
        cases = [y if is_factored(y) else first for y in ys]
        row, sharding = which.reshape((1,) * first.ndim), own_sharding(first)
        differ = any(y is not first for y in cases)
        value = under_automatic_axes(joint.choose, row, cases, out=sharding) if differ else first
        weights.update({} if value is None else {i: value})
    return weights


def _t(rows: Any) -> list[Any]:
    """The columns of some rows."""
    return [*zip(*rows, strict=True)]


@rule("while", typed=True)
def while_loop(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Weights that the loop reads are its constants, those that it carries unchanged too."""
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, consts, carry = operands[:a], operands[a : a + b], operands[a + b :]
    fixed = _fixed(interpreter, eqn, eqn.params["body_jaxpr"], carry, b)
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    moving = lax.while_loop(
        lambda moving: interpreter.evaluate(cond, *tests, *fixed.all(moving))[0],
        lambda moving: fixed.rest(interpreter.evaluate(body, *consts, *fixed.all(moving))),
        fixed.rest(carry),
    )
    return fixed.all(moving)


@rule("scan", typed=True)
def scan(interpreter: Interpreter, eqn: Any, *operands: Any) -> Any:
    """Weights may be constants, carried unchanged, or scanned over: then each operand with the leading axis is."""
    a, b = compat.scan_counts(eqn.params)
    consts, carry, xs = operands[:a], operands[a : a + b], operands[a + b :]
    fixed = _fixed(interpreter, eqn, eqn.params["jaxpr"], carry, a)
    xs = [_led(interpreter, eqn, x) if is_factored(x) else x for x in xs]

    def body(moving: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        sliced = [
            interpreter.settled(_row(x, y), x, eqn) if is_factored(x) else y for x, y in zip(xs, rows, strict=True)
        ]
        out = interpreter.evaluate(eqn.params["jaxpr"], *consts, *fixed.all(moving), *sliced)
        return fixed.rest(out[:b]), out[b:]

    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    stacks = [_stack(x) if is_factored(x) else x for x in xs]
    init = fixed.rest(carry)  # what is formed for it is noted once, before the rounds
    moving, ys = lax.scan(interpreter.repeated(params["length"], body), init, stacks, **params)
    return [*fixed.all(moving), *(_restacked(y, params["length"]) if is_factored(y) else y for y in ys)]


@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a loop carries: weights that it hands on unchanged, by position, and everything else."""

    weights: dict[int, Factored]
    form: Any

    def rest(self, values: Sequence[Any]) -> list[Any]:
        """What really moves, as arrays."""
        return [self.form(x) if is_factored(x) else x for i, x in enumerate(values) if i not in self.weights]

    def all(self, moving: Sequence[Any]) -> list[Any]:
        """All values, the weights in their places."""
        rest = iter(moving)
        return [self.weights[i] if i in self.weights else next(rest) for i in range(len(moving) + len(self.weights))]


def _fixed(interpreter: Interpreter, eqn: Any, body: Any, carry: Sequence[Any], consts: int) -> _Carry:
    """Which of the values that a loop carries are weights that its body returns as they are."""
    sources = compat.forwarded(body)[: len(carry)]
    weights = {i: x for i, x in enumerate(carry) if is_factored(x) and sources[i] == consts + i}
    return _Carry(weights, lambda value: interpreter.form(value, eqn))


def _led(interpreter: Interpreter, eqn: Any, weight: Factored) -> Any:
    """A weight whose first dim is one axis; formed where there is none."""
    fused = sharded_alike(lambda weight: weight.fused(0), weight)
    return interpreter.form(weight, eqn) if fused is None else fused


def _stack(weight: Factored) -> list[jax.Array | None]:
    """What a scan takes slices of: each operand that carries the leading axis, with that axis first."""
    lead, stacks = weight.dims[0], list[Any]()

    def collect(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        carries = lead and lead[0] in axes
        stacks.append(jnp.moveaxis(array, axes.index(lead[0]), 0) if carries else None)
        return array, axes

    weight.map(collect)
    return stacks


def _row(weight: Factored, rows: list[jax.Array | None]) -> Factored:
    """One slice of a stacked weight: slices of what `_stack` gives, and all other operands as they are."""
    lead, slices = weight.dims[0], iter(rows)

    def change(array: jax.Array, axes: Axes) -> tuple[jax.Array, Axes]:
        row = next(slices)
        return (array, axes) if row is None else (row, tuple(axis for axis in axes if axis not in lead))

    return dataclasses.replace(weight.map(change), dims=weight.dims[1:])


def _restacked(rows: Factored, length: int) -> Factored:
    """What a scan makes of a weight that its body returns: every operand has a new leading axis."""
    lead = Axis(next(rows.fresh()), length)
    stacked = rows.map(lambda array, axes: (array, (lead, *axes)))
    return dataclasses.replace(stacked, dims=((lead,), *rows.dims))


@rule("custom_jvp_call", typed=True)
def custom_jvp(interpreter: Interpreter, eqn: Any, *operands: Any) -> list[Any]:
    """The author's derivative stays in force: the tangent of W + AB is factored too, dA·B + A·dB."""

    @jax.custom_jvp
    def call(*operands: Any) -> list[Any]:
        return interpreter.arrays(eqn, eqn.params["call_jaxpr"], *operands)

    def jvp(primals: Any, tangents: Any) -> Any:
        consts = eqn.params["num_consts"]
        pairs = list(zip(primals, tangents, strict=True))[consts:]
        moved = [_tangent(x, dx) if is_factored(x) else compat.instantiate(dx) for x, dx in pairs]
        jaxpr, out_zeros = compat.jvp_jaxpr(eqn, len(moved))
        out = interpreter.arrays(eqn, jaxpr, *(x for x, _ in pairs), *moved)
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


def _constrained(values: Any, shardings: Any) -> list[Any]:
    """The values with those shardings imposed that were given."""

    def impose(x: Any, sharding: Any) -> Any:
        if not isinstance(sharding, jax.sharding.Sharding):
            return x
        if is_factored(x):
            value = constrained(x, sharding)
            return x if value is None else value
        return imposed(x, sharding)

    return [impose(x, sharding) for x, sharding in zip(values, shardings, strict=True)]

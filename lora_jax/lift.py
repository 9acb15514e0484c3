"""`lift`: run the user's function on a tree with Factored leaves, by interpreting its jaxpr.

The function is traced once as if each Factored leaf were its base array. The loop below then walks the equations: one
that no Factored value touches is evaluated as it stands; one that a Factored value touches goes to the rule of its
primitive (see `rules/`); and where there is no rule, or the rule cannot keep the factors apart, the whole matrix would
have to be formed, which is an error unless it is asked for. Nothing is formed silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, overload

import jax
import jax.core
import numpy as np

from lora_jax import compat
from lora_jax.contract import Axis
from lora_jax.factored import Factored, is_factored, materialize, total

F = TypeVar("F", bound=Callable[..., Any])
Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}


class MaterializeError(TypeError):
    """A primitive needs the whole matrix W + ΔW, which `lift` forms only where it is allowed to."""


class UnusedError(ValueError):
    """A leaf is adapted that the function never reads: its factors would not train."""


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers `rule(interpreter, eqn, *operands)` for these primitives.

    At least one operand is Factored. The rule returns the equation's result (a list of them where the primitive has
    several), or NotImplemented where the factors cannot be kept apart.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf: what consumes it, where, and which of the leaf's dimensions play which part.

    Attributes:
      kind: "linear", "conv", "embedding" (rows are looked up), or "other" (the whole matrix is needed).
      in_axes: Dimensions that are summed over (or, of an embedding, looked up).
      out_axes: Dimensions that the result has.
      primitive: The JAX primitive that consumes it.
      where: The user's line.
    """

    kind: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    primitive: str
    where: str


@dataclasses.dataclass
class Interpreter:
    """What the rules share during one interpretation.

    Attributes:
      allow: Whether a whole matrix may be formed.
      uses: What has consumed each leaf so far, by path.
      returned: The leaves that the function hands back, factored as they are.
      line: The user's line that called the function being interpreted, for equations that know none.
    """

    allow: bool
    uses: dict[str, list[Use]] = dataclasses.field(default_factory=dict)
    returned: set[str] = dataclasses.field(default_factory=set)
    line: str = "an unknown line"

    def run(self, fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `fun(*args, **kwargs)` returns, any of whose leaves may be Factored."""
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_factored)
        weights = {i: leaf for i, leaf in enumerate(leaves) if is_factored(leaf)}
        jaxpr, rebuild = _trace(fun, leaves, treedef, weights)
        results = self.evaluate(jaxpr, *weights.values())
        self.returned.update(value.path for value in results if is_factored(value))
        return rebuild(results)

    def evaluate(self, jaxpr: Any, *operands: Any) -> list[Any]:
        """The results of a jaxpr, open or closed, on operands of which any may be Factored; so may the results."""
        jaxpr, consts = compat.parts(jaxpr)
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *operands), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if compat.is_literal(atom) else env[atom]

        for eqn, dead in zip(jaxpr.eqns, compat.last_uses(jaxpr), strict=True):
            with compat.context(eqn):
                results = self._equation(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
            for variable in dead:
                del env[variable]
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        if not any(map(is_factored, operands)):
            return compat.bind(eqn, operands)
        handle = RULES.get(eqn.primitive.name, _no_rule)
        out = handle(self, eqn, *operands)
        if out is not NotImplemented:
            results = out if eqn.primitive.multiple_results else [out]
            before = next(filter(is_factored, operands))
            return [self.settled(y, before, eqn) if is_factored(y) else y for y in results]
        return compat.bind(eqn, [self.form(x, eqn) if is_factored(x) else x for x in operands])

    def where(self, eqn: Any) -> str:
        """The user's line behind an equation."""
        return compat.where(eqn) or self.line

    @contextlib.contextmanager
    def called_at(self, eqn: Any) -> Iterator[None]:
        """While the body of a call is interpreted: its equations stand at the call's line, if at none of their own."""
        outer, self.line = self.line, self.where(eqn)
        try:
            yield
        finally:
            self.line = outer

    def record(self, value: Factored, eqn: Any, kind: str, in_axes: Sequence[Axis], out_axes: Sequence[Axis]) -> None:
        """Notes that an equation consumes a value; the leaf's dimensions in neither group are batch axes."""
        use = Use(kind, _roots(in_axes), _roots(out_axes), eqn.primitive.name, self.where(eqn))
        self.uses.setdefault(value.path, []).append(use)

    def settled(self, value: Factored, before: Factored, eqn: Any) -> Factored | jax.Array:
        """A value, or the array that it is once an equation took a vector out of a matrix: a row that was looked up."""
        if before.is_vector or not value.is_vector:
            return value
        if eqn.primitive.name in ("gather", "dynamic_slice"):
            self.record(value, eqn, "embedding", [axis for axis in before.axes if axis not in value.axes], value.axes)
        else:
            self.record(value, eqn, "other", (), ())
        return total(value)

    def one_of_two(self, eqn: Any, left: Any, right: Any) -> tuple[Any, Any]:
        """The operands of a product; where both are weights and one is a vector, that one is formed."""
        if is_factored(left) and is_factored(right) and left.is_vector != right.is_vector:
            return (self.form(left, eqn), right) if left.is_vector else (left, self.form(right, eqn))
        return left, right

    def form(self, value: Factored, eqn: Any) -> jax.Array:
        """The whole matrix, for an equation that cannot do without it.

        Raises:
          MaterializeError: It is not allowed.
        """
        self.record(value, eqn, "other", (), ())
        if not self.allow:
            mib = value.size * np.dtype(value.dtype).itemsize / 2**20
            raise MaterializeError(
                f"{value.path!r} {value.shape} reaches {eqn.primitive.name!r} at {self.where(eqn)}, which needs the "
                f'whole matrix W + ΔW ({mib:.2g} MiB). Pass materialize="allow" to lift() if that is what you want, '
                "or leave this path out of the rules."
            )
        return materialize(value)


def _no_rule(*_: Any) -> Any:
    return NotImplemented


def _roots(axes: Sequence[Axis]) -> tuple[int, ...]:
    return tuple(sorted({axis.root for axis in axes if axis.root is not None}))


@overload
def lift(fun: F, *, materialize: Literal["error", "allow"] = ..., unused: Literal["error", "allow"] = ...) -> F: ...
@overload
def lift(
    *, materialize: Literal["error", "allow"] = ..., unused: Literal["error", "allow"] = ...
) -> Callable[[F], F]: ...


def lift(
    fun: Callable[..., Any] | None = None,
    *,
    materialize: Literal["error", "allow"] = "error",
    unused: Literal["error", "allow"] = "error",
) -> Any:
    """The same function, of trees that `attach` made: `lift(f)(attach(frozen, lp)) == f(merge(frozen, lp))`.

    W + ΔW is not formed: activations are multiplied by the base and by the small factors. Any argument, positional or
    keyword, may hold Factored leaves; all others (arrays, strings, flags, None, callables) reach the function as they
    are, and what it does with arrays is traced, as under `jax.jit`. Without any Factored leaf the function is called as
    it is. Works bare and as a decorator, under and over `jax.jit`, `jax.grad`, `jax.vmap`, `jax.checkpoint` and their
    kin. A call traces the function: put it under `jax.jit`, as one would any other.

    Args:
      fun: A function of any pytrees, that returns any pytree.
      materialize: "allow" to form the whole matrix where a primitive has no rule that keeps the factors apart.
      unused: "allow" to accept adapted leaves that the function does not read.

    Returns:
      The lifted function. A Factored leaf that it returns (a cast or transposed weight, say) stays Factored.

    Raises:
      MaterializeError: On a call, where a primitive needs the whole matrix.
      UnusedError: On a call, where the function does not read a Factored leaf.
      ValueError: At once, for an unknown option.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.eye(3)}, {"w": lora.LoRA(rank=1)})
    >>> lora.lift(lambda params, x: x @ params["w"])(lora.attach(frozen, lora_params), jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """
    for name, value in (("materialize", materialize), ("unused", unused)):
        if value not in ("error", "allow"):
            raise ValueError(f"lift: {name}={value!r} is neither 'error' nor 'allow'")
    if fun is None:
        return functools.partial(lift, materialize=materialize, unused=unused)

    @functools.wraps(fun)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        paths = [x.path for x in jax.tree.leaves((args, kwargs), is_leaf=is_factored) if is_factored(x)]
        if not paths:
            return fun(*args, **kwargs)
        interpreter = Interpreter(allow=materialize == "allow")
        result = interpreter.run(fun, args, kwargs)
        unread = [path for path in paths if path not in interpreter.uses and path not in interpreter.returned]
        if unread and unused == "error":
            raise UnusedError(
                f"the function does not read {_listed(unread)}, so the factors there would not train: leave the path "
                'out of the rules, or pass unused="allow" to lift()'
            )
        return result

    return lifted


def _trace(fun: Any, leaves: list[Any], treedef: Any, weights: dict[int, Factored]) -> tuple[Any, Callable[..., Any]]:
    """The jaxpr of `fun` over the Factored leaves alone, and what puts its results back into the tree it returns.

    All other arguments are closed over, so they reach the function as the caller gave them; and what the function
    returns that is no traced array is handed on likewise.
    """
    returned: list[Any] = []

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        filled = [*leaves]
        for i, array in zip(weights, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree.unflatten(treedef, filled)
        out, out_tree = jax.tree.flatten(fun(*args, **kwargs))
        traced = [isinstance(leaf, jax.core.Tracer) for leaf in out]
        returned[:] = [out_tree, traced, [None if t else leaf for leaf, t in zip(out, traced, strict=True)]]
        return [leaf for leaf, t in zip(out, traced, strict=True) if t]

    jaxpr = compat.trace(flat, *(weight.stand_in for weight in weights.values()))
    out_tree, traced, static = returned

    def rebuild(results: list[Any]) -> Any:
        values = iter(results)
        return jax.tree.unflatten(out_tree, [next(values) if t else s for t, s in zip(traced, static, strict=True)])

    return jaxpr, rebuild


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

"""`lift`: run the user's function on a tree with Factored leaves, by interpreting its jaxpr.

The function is traced once as if each Factored leaf were its base array; the interpreter then walks the equations.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, overload

import jax
import jax.core

from lora_jax import compat
from lora_jax.explicit import stand_in
from lora_jax.factored import Factored, is_factored
from lora_jax.interpreter import Interpreter
from lora_jax.strategy import Strategy, planned

F = TypeVar("F", bound=Callable[..., Any])
Allow = Literal["error", "allow"]


class UnusedError(ValueError):
    """A leaf is adapted that the function never reads: its factors would not train."""


@overload
def lift(fun: F, *, materialize: Allow = ..., unused: Allow = ..., strategy: Strategy = ...) -> F: ...
@overload
def lift(*, materialize: Allow = ..., unused: Allow = ..., strategy: Strategy = ...) -> Callable[[F], F]: ...


def lift(
    fun: Callable[..., Any] | None = None,
    *,
    materialize: Allow = "error",
    unused: Allow = "error",
    strategy: Strategy = "factored",
) -> Any:
    """The same function, of trees that `attach` made: `lift(f)(attach(frozen, lp)) == f(merge(frozen, lp))`.

    W + ΔW is not formed: activations are multiplied by the base and by the small factors. Any argument, positional or
    keyword, may hold Factored leaves; all others (arrays, strings, flags, None, callables) reach the function as they
    are, and what it does with arrays is traced, as under `jax.jit`. Without any Factored leaf the function is called as
    it is. Works bare and as a decorator, under and over `jax.jit`, `jax.grad`, `jax.vmap`, `jax.checkpoint` and their
    kin, and on any mesh: where its axes are explicit, results are sharded as the function says. A call traces the
    function: put it under `jax.jit`, as one would any other.

    Args:
      fun: A function of any pytrees, that returns any pytree.
      materialize: "allow" to form the whole matrix where a primitive has no rule that keeps the factors apart.
      unused: "allow" to accept adapted leaves that the function does not read.
      strategy: "factored", which takes the cheapest order of products that never forms a weight, (x·A)·B as a rule;
        "hybrid", which forms W + A·B where that takes fewer FLOPs, for as many bytes as W has (see
        `lora_jax.strategy`); or a function that chooses the order, like `lora_jax.order.order`.

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
    plan = planned(strategy)
    if fun is None:
        return functools.partial(lift, materialize=materialize, unused=unused, strategy=strategy)

    @functools.wraps(fun)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        args, kwargs, weights = attached(args, kwargs)
        if not weights:
            return fun(*args, **kwargs)
        interpreter = Interpreter(materialize == "allow", plan)
        result, read = run(interpreter, fun, args, kwargs)
        read.update(path for path, _ in interpreter.uses)
        unread = [path for weight in weights for path in weight.paths if path not in read]
        if unread and unused == "error":
            raise UnusedError(
                f"the function does not read {_listed(unread)}, so the factors there would not train: leave the path "
                'out of the rules, or pass unused="allow" to lift()'
            )
        return result

    return lifted


def attached(args: Any, kwargs: Any) -> tuple[Any, Any, list[Factored]]:
    """The arguments, and their Factored leaves: of several with one path, the second's is "path (2)", and so on."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_factored)
    seen, weights = collections.Counter[str](), list[Factored]()
    for i, leaf in enumerate(leaves):
        if is_factored(leaf):
            seen.update(leaf.paths)
            again = {path: f"{path} ({seen[path]})" for path in leaf.paths if seen[path] > 1}
            leaves[i] = leaf.renamed(again) if again else leaf
            weights.append(leaves[i])
    return *jax.tree.unflatten(treedef, leaves), weights


def run(interpreter: Interpreter, fun: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, set[str]]:
    """What `fun(*args, **kwargs)` returns, any of whose leaves may be Factored, and the paths of leaves it hands on."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_factored)
    weights = {i: leaf for i, leaf in enumerate(leaves) if is_factored(leaf)}
    jaxpr, rebuild = _trace(fun, leaves, treedef, weights)
    results = interpreter.evaluate(jaxpr, *weights.values())
    interpreter.hand_on(value for value in results if is_factored(value))
    return rebuild(results), {path for value in results if is_factored(value) for path in value.paths}


def probe(interpreter: Interpreter, fun: Callable[..., Any], args: Any, kwargs: Any) -> set[str]:
    """Interprets `fun(*args, **kwargs)` without computing anything; the paths of leaves that it hands on.

    `jax.ShapeDtypeStruct` may stand for any array.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_factored)
    abstract = {i: x for i, x in enumerate(leaves) if is_factored(x) or isinstance(x, jax.ShapeDtypeStruct)}
    handed_on: set[str] = set()

    def interpret(present: dict[int, Any]) -> None:
        args, kwargs = jax.tree.unflatten(treedef, [present.get(i, leaf) for i, leaf in enumerate(leaves)])
        handed_on.update(run(interpreter, fun, args, kwargs)[1])

    jax.eval_shape(interpret, abstract)
    return handed_on


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

    jaxpr = compat.trace(flat, *map(stand_in, weights.values()))
    out_tree, traced, static = returned

    def rebuild(results: list[Any]) -> Any:
        values = iter(results)
        return jax.tree.unflatten(out_tree, [next(values) if t else s for t, s in zip(traced, static, strict=True)])

    return jaxpr, rebuild


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")

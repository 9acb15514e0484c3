"""What the laws are stated in: random factors, errors, and what a jaxpr makes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from lora_jax import compat
from lora_jax.factors import together

# Equations that show a weight from another side. A broadcast is none of them: zeros of a weight's shape are one.
VIEWS = {
    "slice",
    "squeeze",
    "reshape",
    "transpose",
    "convert_element_type",
    "dynamic_slice",
    "gather",
    "rev",
    "copy",
    "optimization_barrier",
    "reshard",
}


def normal(*shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> jax.Array:
    """Random numbers, drawn by NumPy: JAX compiles a program for each shape, and here there are hundreds."""
    return jax.device_put(np.random.default_rng(seed).normal(mean, scale, shape).astype(np.float32))


def randomized(lora_params: Any, scale: float = 0.1, seed: int = 0) -> Any:
    """The same adapters with every factor drawn at random, B too."""
    leaves, treedef = jax.tree.flatten(lora_params)
    rng = np.random.default_rng(seed)
    drawn = [jax.device_put((scale * rng.standard_normal(x.shape)).astype(x.dtype)) for x in leaves]
    return jax.tree.unflatten(treedef, drawn)


def split_at_random(params: Any, rules: Any, sites: Any = None, scale: float = 0.3) -> tuple[Any, Any]:
    """What `lora.split` returns for a tree of arrays, randomized; what it would draw itself is not computed first."""
    split = functools.partial(lora.split, jax.random.key(0), rules=rules, sites=sites)
    return params, randomized(jax.eval_shape(split, params)[1], scale)


def error(found: Any, expected: Any) -> float:
    """The largest relative error of any leaf, in the norm of the leaf; not a number if an entry of one is none."""

    def of_leaf(a: Any, b: Any) -> float:
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        return float(np.linalg.norm((a - b).ravel()) / max(np.linalg.norm(b.ravel()), 1e-30))

    return float(np.max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected))))


def all_adaptable(variant: lora.Variant) -> Any:
    """The rule that adapts every leaf that can be."""
    return lambda path, site: variant if site.adaptable and site.kind in variant.kinds else None


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr that has none within, and of those within it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [x for value in eqn.params.values() for x in jax.tree.leaves(value, is_leaf=is_jaxpr) if is_jaxpr(x)]
        if inner:
            for x in inner:
                yield from equations(x)
        else:
            yield eqn


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def formed(jaxpr: Any, lora_params: Any) -> list[str]:
    """The equations that make an array as large as an adapted weight, or one layer of it, out of factors.

    What a function does with the base alone it does without adapters too; and a view of an array makes none.

    Args:
      jaxpr: Of a function whose first argument is `lora_params`.
      lora_params: The adapters.
    """
    sizes = set()
    for adapter in together(lora_params).values():
        sizes |= {math.prod(adapter.site.shape), math.prod(sum(adapter.site.sizes()[1:], ()))}
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    n = len(jax.tree.leaves(lora_params))
    found: list[str] = []
    _follow(jaxpr, [i < n for i in range(len(jaxpr.invars))], sizes, found)
    return found


def _follow(jaxpr: Any, moved: list[bool], sizes: set[int], found: list[str]) -> list[bool]:
    """Which results of a jaxpr depend on the factors, if those of its arguments do that `moved` says."""
    depends = dict(zip(jaxpr.invars, moved, strict=True))

    def of(atom: Any) -> bool:
        return not hasattr(atom, "val") and depends.get(atom, False)

    for eqn in jaxpr.eqns:
        ins = [of(v) for v in eqn.invars]
        outs = _inside(eqn, ins, sizes, found)
        if outs is None:
            outs = [any(ins)] * len(eqn.outvars)
            if any(ins) and eqn.primitive.name not in VIEWS:
                shapes = [v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape")]
                found += [f"{eqn.primitive.name} {shape}" for shape in shapes if math.prod(shape) in sizes]
        depends.update(zip(eqn.outvars, outs, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _inside(eqn: Any, ins: list[bool], sizes: set[int], found: list[str]) -> list[bool] | None:
    """Which results of an equation with jaxprs in it depend on the factors; None if it has none."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        branches = [_follow(b.jaxpr, ins[1:], sizes, found) for b in params["branches"]]
        return [any(outs) or ins[0] for outs in zip(*branches, strict=True)]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        consts, carry = ins[a : a + b], ins[a + b :]
        for _ in carry:  # what depends once round depends for good
            outs = _follow(params["body_jaxpr"].jaxpr, consts + carry, sizes, found)
            carry = [x or y for x, y in zip(carry, outs, strict=True)]
        return carry
    inner = [params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if is_jaxpr(params.get(key))]
    if not inner:
        return None
    body = getattr(inner[0], "jaxpr", inner[0])
    if name == "scan":
        a, b = compat.scan_counts(params)
        for _ in range(b + 1):
            outs = _follow(body, ins, sizes, found)
            ins = [x or (a <= i < a + b and outs[i - a]) for i, x in enumerate(ins)]
        return outs
    return _follow(body, ins, sizes, found)


def flops(fun: Any, *args: Any) -> float:
    """What XLA counts for the compiled function."""
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]

"""What the laws are stated in: random factors, errors, and what a jaxpr makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora

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
}


def randomized(lora_params: Any, scale: float = 0.1) -> Any:
    """The same adapters with every factor drawn at random, B too."""
    leaves, treedef = jax.tree.flatten(lora_params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [scale * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def error(found: Any, expected: Any) -> float:
    """The largest relative error of any leaf, in the norm of the leaf."""

    def of_leaf(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected)))


def all_adaptable(variant: lora.Variant) -> Any:
    """The rule that adapts every leaf that can be."""
    return lambda path, site: variant if site.adaptable else None


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
    """The equations that make an array as large as an adapted weight, or one layer of it, and are no view of it."""
    sizes = set()
    for adapter in lora_params.values():
        sizes |= {math.prod(adapter.site.shape), math.prod(sum(adapter.site.sizes()[1:], ()))}
    return [
        f"{eqn.primitive.name} {var.aval.shape}"
        for eqn in equations(jaxpr)
        for var in eqn.outvars
        if math.prod(getattr(var.aval, "shape", ())) in sizes and eqn.primitive.name not in VIEWS
    ]


def flops(fun: Any, *args: Any) -> float:
    """What XLA counts for the compiled function."""
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]

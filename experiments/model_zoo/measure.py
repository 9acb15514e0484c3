"""What is measured of a model: sites, whole matrices, the lifted step's error and its FLOPs."""

from __future__ import annotations

import collections
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import bound
import jax
import jax.numpy as jnp
import numpy as np
from case import Case

import lora_jax as lora
from lora_jax import tree

RANK = 8


def of(make: Callable[..., Case]) -> dict[str, Any]:
    """The row of a model; its FLOPs are those of the model without loops, whose bodies XLA counts once."""
    case = make()
    sites = lora.sites(case.loss, case.params, *case.batch)
    frozen, lora_params = lora.split(jax.random.key(0), case.params, all_adaptable, sites=sites)
    kinds = collections.Counter(site.kind for site in sites.values())
    materialized = take_out_what_materializes(case, frozen, lora_params)
    lora_params = randomized(lora_params)
    dtypes = ["float32", "float64"] if case.double else ["float32"]
    loops = "unroll" in inspect.signature(make).parameters
    return {
        "sites": dict(sorted(kinds.items())),
        "adapted": sum(site.adaptable for site in sites.values()),
        "materialized": materialized,
        "errors": {dtype: errors(case, frozen, lora_params, dtype) for dtype in dtypes},
        "unrolled": loops,
        **flops_and_bound(make(unroll=True) if loops else case, frozen, lora_params),
    }


def errors(case: Case, frozen: Any, lora_params: Any, dtype: str) -> dict[str, float]:
    """How far the lifted function's value and gradients are from the merged one's, computed in this dtype."""

    def cast(x: Any) -> Any:
        return x.astype(dtype) if isinstance(x, jax.Array) and x.dtype == jnp.float32 else x

    with jax.enable_x64(dtype == "float64"):
        args = jax.tree.map(cast, (lora_params, frozen, case.batch))
        value, gradients = run(step(case, lora.lift, lora.attach), *args)
        expected, its_gradients = run(step(case, lambda loss: loss, lora.merge), *args)
        return {"value": error(value, expected), "gradients": error(gradients, its_gradients)}


def flops_and_bound(case: Case, frozen: Any, lora_params: dict[str, Any]) -> dict[str, dict[str, float]]:
    """FLOPs of the lifted step and of full fine-tuning with the bound that follows, as compiled and without fusion."""
    products = bound.products(*by_path(case, list(lora_params)))
    ranks = {path: adapter.variant.rank for path, adapter in lora_params.items()}
    found = {}
    for name, options in {"flops": {}, "flops_unfused": {"xla_disable_hlo_passes": "fusion"}}.items():
        full = flops(options, *full_step(case, list(lora_params)))
        lifted = flops(options, step(case, lora.lift, lora.attach), lora_params, frozen, case.batch)
        found[name] = {"lifted": lifted, "full": full, "bound": bound.lora_step(full, products, ranks)}
    return found


def all_adaptable(path: str, site: lora.Site) -> lora.Variant | None:
    """LoRA wherever there is an in and an out side, of a rank that fits both."""
    return lora.LoRA(min(RANK, *map(math.prod, site.sizes()[1:]))) if site.adaptable else None


def take_out_what_materializes(case: Case, frozen: Any, lora_params: dict[str, Any]) -> dict[str, str]:
    """Removes the adapters whose weight some primitive needs whole; the errors, by path."""
    errors, lifted = dict[str, str](), step(case, lora.lift, lora.attach)
    while True:
        try:
            jax.eval_shape(functools.partial(lifted, frozen=frozen, batch=case.batch), lora_params)
            return errors
        except lora.MaterializeError as error:
            path = str(error).split("'")[1]
            errors[path] = str(error)
            del lora_params[path]


def step(case: Case, transform: Any, join: Any) -> Any:
    """Value and gradients of the loss, with respect to the factors."""

    def of_factors(lora_params: Any, frozen: Any, batch: Any) -> jax.Array:
        return transform(case.loss)(join(frozen, lora_params), *batch)

    return jax.value_and_grad(of_factors)


def full_step(case: Case, paths: list[str]) -> tuple[Any, ...]:
    """Value and gradients with respect to the leaves themselves, and what to call it on."""
    loss, leaves, *batch = by_path(case, paths)
    return jax.value_and_grad(lambda leaves, batch: loss(leaves, *batch)), leaves, batch


def by_path(case: Case, paths: list[str]) -> tuple[Any, ...]:
    """The loss as a function of some leaves of its params, in a dict by path."""
    leaves, treedef = tree.flatten(case.params)

    def loss(chosen: Any, *batch: Any) -> jax.Array:
        return case.loss(tree.unflatten(treedef, {**leaves, **chosen}), *batch)

    return loss, {path: leaves[path] for path in paths}, *case.batch


def lowered(fun: Any, *args: Any) -> tuple[Any, list[jax.Array]]:
    """The function lowered for its arguments' arrays, with all other leaves as they are; and those arrays."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

    def flat(values: list[jax.Array]) -> Any:
        filled = {**dict(enumerate(leaves)), **dict(zip(arrays, values, strict=True))}
        return fun(*jax.tree.unflatten(treedef, filled.values()))

    values = list(arrays.values())
    return jax.jit(flat).lower(values), values


def flops(options: dict[str, str], fun: Any, *args: Any) -> float:
    """What XLA counts for the compiled function."""
    return lowered(fun, *args)[0].compile(compiler_options=options).cost_analysis()["flops"]


def run(fun: Any, *args: Any) -> Any:
    """What the compiled function returns."""
    program, values = lowered(fun, *args)
    return program.compile()(values)


def randomized(lora_params: Any) -> Any:
    """The same adapters with every factor drawn at random, B too."""
    leaves, treedef = jax.tree.flatten(lora_params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [0.1 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def error(found: Any, expected: Any) -> float:
    """The largest relative error of any leaf, in the norm of the leaf."""

    def of_leaf(a: jax.Array, b: jax.Array) -> float:
        return float(jnp.linalg.norm((a - b).ravel()) / jnp.maximum(jnp.linalg.norm(b.ravel()), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(of_leaf, found, expected)))

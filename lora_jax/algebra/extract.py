"""`extract`: the best adapter between two checkpoints, leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.algebra.lowrank import SVD, is_plain, truncated
from lora_jax.choice import Rules, choose
from lora_jax.contract import wider
from lora_jax.explicit import whole
from lora_jax.factors import Adapter, LoraParams
from lora_jax.matrices import to_matrices
from lora_jax.sites import Site
from lora_jax.variants.full import Full
from lora_jax.variants.lora import LoRA


def extract(base: Any, tuned: Any, rules: Rules | int, *, sites: Mapping[str, Site] | None = None) -> LoraParams:
    """The adapter that takes `base` closest to `tuned`: merge(base, extract(base, tuned, ...)) ≈ tuned.

    Each ΔW = tuned - base is cut off at the variant's rank by its singular values, layer by layer of a stacked leaf,
    so that no adapter of that rank comes closer in the Frobenius norm: what is missing is √Σ σᵢ² of those left out.
    A has orthonormal columns, B the singular values. With rules, it works under `jax.jit`.

    Args:
      base: A pytree of parameters.
      tuned: One of the same paths and shapes.
      rules: As `split` takes them, with `LoRA` and `Full`, which carries the leaf's change whole; a leaf without a rule
        is left as it is in the base. Or a rank: then every leaf that changed has LoRA of that rank, or the highest that
        its sides allow, and those without two sides (biases, norms) `Full`: nothing that changed is left behind.
      sites: What `sites` found: which axes are stacked, in and out. Without it a matrix counts as (in, out), and
        matrices of more dimensions need their axes in the rule.

    Returns:
      `lora_params` for `attach` and `merge`, with `base`.

    Raises:
      ValueError: The trees differ in paths or shapes, or not at all; values are not finite; a rule does not fit, as in
        `split`; a variant is neither `LoRA` nor `Full`; or a rank is given inside `jax.jit`, where what changed is not
        known.

    Source: Eckart and Young 1936, https://doi.org/10.1007/BF02288367.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> base = {"w": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
    >>> tuned = {"w": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
    >>> found = lora.extract(base, tuned, 1)
    >>> list(found), bool(jnp.allclose(lora.merge(base, found)["w"], 1, atol=1e-6))
    (['w'], True)
    """
    before, after = _arrays(base), _arrays(tuned)
    _check_alike(before, after)
    if isinstance(rules, int):
        rules = _everywhere(rules, before, after, sites)
    chosen = choose(rules, before, sites)
    if not chosen:
        raise ValueError("the rules take no leaf, or none has changed: there is nothing to extract")
    return {path: _extracted(path, before[path], after[path], *chosen[path]) for path in chosen}


def _extracted(path: str, before: Any, after: Any, variant: Any, site: Site) -> Adapter:
    for name, array in (("base", before), ("tuned", after)):
        if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
            raise ValueError(f"{path!r} has values in {name} that are not finite: there is no change to extract")
    if isinstance(variant, Full):
        dtype = jax.dtypes.canonicalize_dtype(variant.dtype or after.dtype)
        return Adapter({"weight": jnp.array(after, dtype, copy=True)}, variant, site)
    if not is_plain(variant):
        raise ValueError(f"{path!r}: extract makes LoRA, or Full, and no {type(variant).__name__}: change the rule")
    if variant.rank > site.max_rank:
        raise ValueError(
            f"{path!r} {site.shape}: rank {variant.rank} is above {site.max_rank}, the most that its sides allow: "
            "lower it, or give Full()"
        )
    wide = wider(before.dtype, after.dtype, jnp.float32)
    delta = to_matrices(whole(jnp.asarray(after, wide) - jnp.asarray(before, wide)), site)
    return truncated(SVD(*jnp.linalg.svd(delta, full_matrices=False)), site, variant)


def _everywhere(rank: int, before: Mapping[str, Any], after: Mapping[str, Any], sites: Any) -> Rules:
    """LoRA for each leaf that changed and has two sides, Full for each other that changed."""
    if any(isinstance(x, jax.core.Tracer) for x in (*before.values(), *after.values())):
        raise ValueError(
            "extract finds the leaves that changed by their values, and inside jax.jit there are none: give rules"
        )

    def rule(path: str, site: Site) -> Any:
        if bool((jnp.asarray(before[path]) == jnp.asarray(after[path])).all()):
            return None
        if site.adaptable:
            return LoRA(min(rank, site.max_rank))
        return LoRA(rank) if sites is None and len(site.shape) > 1 else Full()

    return rule


def _arrays(params: Any) -> dict[str, Any]:
    leaves, _ = tree.flatten(params)
    return {path: leaf for path, leaf in leaves.items() if tree.is_array(leaf)}


def _check_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for one, other, name in ((before, after, "tuned"), (after, before, "base")):
        for path in one:
            if path not in other:
                raise ValueError(
                    f"{path!r} is missing in {name}: give two checkpoints of one model{tree.close_to(path, other)}"
                )
    for path, leaf in before.items():
        if leaf.shape != after[path].shape:
            raise ValueError(
                f"{path!r} has shape {leaf.shape} in base and {after[path].shape} in tuned: give one model's"
            )

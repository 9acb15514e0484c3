"""`relative_to`: adapters of a base that their start has changed, as adapters of the base as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.contract import wider
from lora_jax.explicit import whole
from lora_jax.factors import Adapter, LoraParams
from lora_jax.initial.pissa import halves, randomized_svd
from lora_jax.matrices import to_matrices
from lora_jax.variants.base import SHARED
from lora_jax.variants.lora import LoRA


def relative_to(params: Any, frozen: Any, lora_params: Mapping[str, Adapter]) -> LoraParams:
    """Adapters that merge into `params` to what `lora_params` merge into `frozen` to.

    PiSSA, OLoRA, CorDA, LoRA-GA and their kin train beside W - s·A₀·B₀. Whoever loads the adapter has W: for them it is
    [A | A₀'] and [B | -B₀'] of twice the rank, where s·A₀'·B₀' is what `frozen` lacks of `params`, found in the two
    trees themselves (so that it holds the rounding of the frozen leaves as far as a rank can). An adapter whose start
    left the base alone stays as it is.

    Args:
      params: The tree that `split` was given.
      frozen: The tree that it returned.
      lora_params: The adapters, trained or not.

    Returns:
      Adapters by path, which share the factors of those that stay as they are. The others are in float32 or wider, as
      A·B and A₀'·B₀' nearly cancel.

    Raises:
      ValueError: The trees do not have a path, or differ in its shape; or what they differ by is not of the adapter's
        rank, as after LoftQ, or if the trees are not of the same split; or the adapter is not plain A and B.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=2, init="pissa")})
    >>> exported = lora.relative_to(params, frozen, lora_params)
    >>> exported["w"].variant.rank, bool(jnp.allclose(lora.merge(params, exported)["w"], params["w"], atol=1e-5))
    (4, True)
    """
    before, after = tree.flatten(params)[0], tree.flatten(frozen)[0]
    return {path: _exported(path, before, after, adapter) for path, adapter in lora_params.items()}


def _exported(path: str, before: Mapping[str, Any], after: Mapping[str, Any], adapter: Adapter) -> Adapter:
    if adapter.site.kind == SHARED:
        return adapter
    for name, leaves in (("params", before), ("frozen", after)):
        if path not in leaves or leaves[path].shape != adapter.site.shape:
            found = f"a leaf of shape {leaves[path].shape}" if path in leaves else "no leaf"
            raise ValueError(f"{path!r}: {name} has {found} there, and the adapter is for {adapter.site.shape}")
    old, new, variant = before[path], after[path], adapter.variant
    if bool((jnp.asarray(old) == jnp.asarray(new)).all()):
        return adapter
    if not isinstance(variant, LoRA) or {*adapter.factors} != {"A", "B"}:
        raise ValueError(
            f"{path!r}: params and frozen differ, and of {type(variant).__name__} with factors "
            f"{sorted(adapter.factors)} it is not known how to make up for it: merge instead"
        )
    wide = wider(old.dtype, jnp.float32)
    old, new = (to_matrices(whole(jnp.asarray(leaf, wide)), adapter.site) for leaf in (old, new))
    with jax.default_matmul_precision("highest"):
        u, s, vt = randomized_svd(jax.random.key(0), new - old, variant.rank, 2)
        left = jnp.linalg.norm(new - old - (u * s[..., None, :]) @ vt)
        a, b = halves(u, s, vt, variant.scale)
    size = float(jnp.linalg.norm(old) + jnp.linalg.norm(new))
    # No entry of the frozen leaf was rounded by more than half a unit in its last place.
    rounded = float(jnp.linalg.norm(new)) * float(jnp.finfo(after[path].dtype).eps) / 2
    if not left <= rounded + size * 16 * float(jnp.finfo(wide).eps):
        raise ValueError(
            f"{path!r}: params and frozen differ by more than rank {variant.rank} holds ({float(left) / size:.1%} of "
            "them is left): give the params and the frozen tree of the split that these adapters come from; what is "
            "frozen as quantized, as by LoftQ, can only be used with that base"
        )
    batch, inner, outer = adapter.site.sizes()
    factors = {
        "A": jnp.concatenate([whole(jnp.asarray(adapter.factors["A"], wide)), a.reshape(*batch, *inner, -1)], -1),
        "B": jnp.concatenate(
            [whole(jnp.asarray(adapter.factors["B"], wide)), b.reshape(*batch, -1, *outer)], len(batch)
        ),
    }
    rank = 2 * variant.rank
    alpha = variant.scale * (math.sqrt(rank) if variant.scaling == "rank_stabilized" else rank)
    # They are no longer what the base has less: for whoever asks, they began as any.
    variant = dataclasses.replace(variant, rank=rank, alpha=alpha, init="normal", dtype=jnp.dtype(wide).name)
    return dataclasses.replace(adapter, factors=factors, variant=variant)

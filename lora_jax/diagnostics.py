"""What an adapter has learned: its spectrum, its effective rank, its directions, and what of W it amplifies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import tree
from lora_jax.algebra.lowrank import SVD, low_rank
from lora_jax.axes import Axis, weight_axes
from lora_jax.contract import contract, wider
from lora_jax.factors import Adapter, LoraParams, together
from lora_jax.variants.full import Full

Side = Literal["A", "B", "in", "out"]


def singular_values(lora_params: Mapping[str, Adapter]) -> dict[str, jax.Array]:
    """The singular values of each ΔW, from its factors: ΔW is not formed. Works under `jax.jit`.

    Args:
      lora_params: Of variants whose ΔW is a product A·B. Leaves in `Full`, which have no factors, are left out.

    Returns:
      By path, an array (batch..., min(rank, in, out)), descending, for each stacked layer or expert.

    Raises:
      ValueError: A variant's ΔW is no such product.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(
    ...     jax.random.key(0),
    ...     {"w": jnp.ones((3, 8, 4))},
    ...     {"w": lora.LoRA(rank=2).at(batch_axes=0, in_axes=1, out_axes=2)},
    ... )
    >>> lora.singular_values(lora_params)["w"].shape
    (3, 2)
    """
    return {path: low_rank(path, adapter).svd().s for path, adapter in _low_rank_only(lora_params).items()}


def effective_rank(lora_params: Mapping[str, Adapter]) -> dict[str, jax.Array]:
    """How many directions each ΔW has, weighted: exp(-Σ pᵢ log pᵢ) with pᵢ = σᵢ / Σ σ, the exponential of an entropy.

    It lies between 1 (one direction) and the rank (all equally strong), and is 0 where ΔW is zero. If it is much less
    than the rank, `resize` loses little.

    Args:
      lora_params: As in `singular_values`.

    Returns:
      By path, an array of the batch's sizes, or a scalar.

    Raises:
      ValueError: As `singular_values`.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality",
    https://www.eurasip.org/Proceedings/Eusipco/Eusipco2007/Papers/a5p-h05.pdf.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> lora_params["w"].factors.update(A=jnp.eye(8, 2), B=jnp.eye(2, 4))
    >>> float(lora.effective_rank(lora_params)["w"])
    2.0
    """

    def of(s: jax.Array) -> jax.Array:
        total = s.sum(-1, keepdims=True)
        p = s / jnp.where(total > 0, total, 1)
        entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)
        return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)

    return {path: of(s) for path, s in singular_values(lora_params).items()}


def subspace_similarity(
    first: Mapping[str, Adapter], second: Mapping[str, Adapter], *, side: Side = "A"
) -> dict[str, jax.Array]:
    """How much of the first i directions of one adapter lies in the first j of another, for all i and j.

    φ(i, j) = ‖UᵢᵀVⱼ‖² / min(i, j), in the Frobenius norm, where Uᵢ and Vⱼ are the first i and j singular vectors: 1
    where one subspace holds the other, 0 where they are orthogonal. At [..., i - 1, j - 1] is φ(i, j).

    Args:
      first: As in `singular_values`.
      second: Likewise; ranks may differ. Paths that only one of them has are left out.
      side: The vectors of which matrix: "A", those of its in side, as in the paper; "B", those of its out side; "in"
        or "out", those of ΔW itself, which do not depend on how it is split in A and B.

    Returns:
      By path, an array (batch..., i, j) with values from 0 to 1. Singular vectors of singular values that are equal, as
      zeros are, are arbitrary, and so is φ between them.

    Raises:
      ValueError: They have no path in common, or different leaves there; or as `singular_values`.

    Source: Hu et al. 2021, section 7.2 and appendix G, https://arxiv.org/abs/2106.09685.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> similarity = lora.subspace_similarity(lora_params, lora_params)["w"]
    >>> similarity.shape, round(float(similarity[1, 1]), 4)
    ((2, 2), 1.0)
    """
    if side not in ("A", "B", "in", "out"):
        raise ValueError(f"side={side!r} is none of 'A', 'B', 'in', 'out'")
    first, second = _low_rank_only(first), _low_rank_only(second)
    shared = [path for path in first if path in second]
    if not shared:
        raise ValueError("the two adapters have no path in common, so there is nothing to compare")
    similarities = {}
    for path in shared:
        u, v = (_directions(path, adapters[path], side) for adapters in (first, second))
        if u.shape[:-1] != v.shape[:-1]:
            raise ValueError(
                f"{path!r}: the adapters were made for leaves of different sizes: compare those of one model"
            )
        wide = wider(u.dtype, v.dtype)
        overlap = jnp.matmul(u.astype(wide).mT, v.astype(wide), precision=lax.Precision.HIGHEST) ** 2
        i, j = (jnp.arange(1, n + 1, dtype=wide) for n in overlap.shape[-2:])
        similarities[path] = overlap.cumsum(-2).cumsum(-1) / jnp.minimum(i[:, None], j)
    return similarities


def _low_rank_only(lora_params: Mapping[str, Adapter]) -> LoraParams:
    return {path: adapter for path, adapter in together(lora_params).items() if not isinstance(adapter.variant, Full)}


def _directions(path: str, adapter: Adapter, side: Side) -> jax.Array:
    """Singular vectors as columns, (batch..., in or out, k)."""
    product = low_rank(path, adapter)
    if side == "A":
        return jnp.linalg.svd(product.a, full_matrices=False)[0]
    if side == "B":
        return jnp.linalg.svd(product.b, full_matrices=False)[2].mT
    return product.svd().u if side == "in" else product.svd().vt.mT


def amplification(params: Any, lora_params: Mapping[str, Adapter]) -> dict[str, jax.Array]:
    """How much stronger ΔW is in its own directions than W is there: ‖ΔW‖ / ‖UᵀWV‖, in the Frobenius norm.

    U and V are the singular vectors of ΔW whose singular values are above rounding; neither ΔW nor a second W is
    formed. A large value says that directions were learned that W has, but hardly uses.

    Args:
      params: The base: what `split` returned first, or any tree with leaves of these shapes at these paths.
      lora_params: As in `singular_values`.

    Returns:
      By path, an array of the batch's sizes, or a scalar; 0 where ΔW is zero.

    Raises:
      ValueError: A path is not in `params`, or its shape is another; or as `singular_values`.

    Source: Hu et al. 2021, section 7.3, https://arxiv.org/abs/2106.09685.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> _, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=1)})
    >>> lora_params["w"].factors.update(A=jnp.ones((8, 1)), B=3 * jnp.ones((1, 4)))
    >>> round(float(lora.amplification(params, lora_params)["w"]), 4)
    3.0
    """
    leaves, _ = tree.flatten(params)
    return {path: _amplification(path, adapter, leaves) for path, adapter in _low_rank_only(lora_params).items()}


def _amplification(path: str, adapter: Adapter, leaves: Mapping[str, Any]) -> jax.Array:
    if path not in leaves:
        raise ValueError(f"the tree has no leaf at {path!r}{tree.close_to(path, leaves)}")
    weight, site = leaves[path], adapter.site
    if tuple(weight.shape) != site.shape:
        raise ValueError(
            f"{path!r}: the adapter was made for a leaf of shape {site.shape}, and this has {weight.shape}"
        )
    u, s, vt = _above_rounding(low_rank(path, adapter).svd())
    batch, inner, outer = site.axes()
    left, right = Axis("left", s.shape[-1]), Axis("right", s.shape[-1])
    batches, ins, outs = site.sizes()
    wide = wider(weight.dtype, s.dtype)
    operands = [
        (jnp.asarray(weight, wide), weight_axes(site.shape)),
        (u.reshape(*batches, *ins, -1).astype(wide), (*batch, *inner, left)),
        (vt.reshape(*batches, -1, *outs).astype(wide), (*batch, right, *outer)),
    ]
    projected = contract(operands, (*batch, left, right), precision=lax.Precision.HIGHEST)
    strength, present = jnp.linalg.norm(s, axis=-1), jnp.linalg.norm(projected, axis=(-2, -1))
    return jnp.where(strength > 0, strength / present, 0)


def _above_rounding(svd: SVD) -> SVD:
    """With zeros for the vectors of singular values that are zero but for rounding."""
    kept = svd.s > svd.s[..., :1] * jnp.finfo(svd.s.dtype).eps * max(svd.u.shape[-2], svd.vt.shape[-1])
    return SVD(jnp.where(kept[..., None, :], svd.u, 0), svd.s, jnp.where(kept[..., :, None], svd.vt, 0))

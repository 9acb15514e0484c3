"""`combine`: several adapters as one, exactly, or of less rank, or by a vote."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp

from lora_jax import tree
from lora_jax.algebra.lowrank import SVD, LowRank, is_plain, lora_adapter, low_rank, matmul, truncated
from lora_jax.algebra.task_arithmetic import RECIPES
from lora_jax.contract import wider
from lora_jax.factors import Adapter, LoraParams, key_of, together
from lora_jax.variants.full import Full
from lora_jax.variants.lora import LoRA

METHODS = ("cat", "svd", *RECIPES, *(f"{name}_svd" for name in RECIPES if name != "linear"))


@dataclasses.dataclass(frozen=True)
class _How:
    """What `combine` is asked to do, at every path."""

    method: str
    rank: int | None
    density: float | None
    majority: Literal["total", "frequency"]
    key: jax.Array | None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is none of {', '.join(METHODS)}")
        takes = {
            "rank": self.method.endswith("svd"),
            "density": self.recipe.prune is not None,
            "key": self.recipe.prune == "random",
        }
        for name, wanted in takes.items():
            given = getattr(self, name) is not None
            if given and not wanted:
                raise ValueError(f"combine(method={self.method!r}) does nothing with a {name}: leave it out")
            if wanted and not given and name != "rank":
                raise ValueError(f"combine(method={self.method!r}) needs a {name}")
        if self.rank is not None and (int(self.rank) != self.rank or self.rank < 1):
            raise ValueError(f"combine(rank={self.rank}): the rank is a whole number, 1 or more")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"combine(density={self.density}): the share that is kept is above 0 and at most 1")
        if self.majority not in ("total", "frequency"):
            raise ValueError(f"combine(majority={self.majority!r}): the vote is by 'total' or by 'frequency'")
        if self.majority != "total" and not self.recipe.elect:
            raise ValueError(f"combine(method={self.method!r}) takes no vote: leave majority out")

    @property
    def recipe(self) -> Any:
        """How tensors of several tasks become one; of "cat" and "svd", a weighted sum."""
        return RECIPES.get(self.method.removesuffix("_svd"), RECIPES["linear"])

    def blend(self, path: str, name: str, tensors: Sequence[jax.Array], weights: jax.Array, batch: int) -> jax.Array:
        """The tensors that several adapters have for one thing, as one; random numbers depend on path and name."""
        key = None if self.key is None else key_of(self.key, f"{path}:{name}")
        return self.recipe(tensors, weights, density=self.density, majority=self.majority, key=key, batch=batch)


def combine(
    adapters: Sequence[Mapping[str, Adapter]],
    weights: Sequence[float] | jax.Array,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: Literal["total", "frequency"] = "total",
    key: jax.Array | None = None,
    base: Any = None,
) -> LoraParams:
    """Several adapters of one base as one, ΔW ≈ Σ wᵢ ΔWᵢ. Pure; works under `jax.jit`.

    | method | what it is |
    |---|---|
    | "cat" | the sum, exactly: factors side by side, so that ranks add up |
    | "svd" | the best adapter of rank `rank` for the sum, in the Frobenius norm; ΔW is never formed |
    | "linear" | A = Σ ±√\\|wᵢsᵢ\\| Aᵢ and B = Σ √\\|wᵢsᵢ\\| Bᵢ: not the sum, whose product has cross terms AᵢBⱼ, too |
    | "magnitude_prune" | as "linear", of factors of which only the largest entries are kept |
    | "dare_linear" | as "linear", of factors of which random entries are kept, and enlarged |
    | "ties" | as "magnitude_prune", but each entry is the mean over those adapters that have the elected sign |
    | "dare_ties" | as "dare_linear", likewise |
    | "ties_svd", "dare_linear_svd", ... | the same of the ΔWᵢ, which are formed one leaf at a time; then as "svd" |

    "cat", "svd" and those that end in "_svd" take any rank, scale and scaling, mixed, and every variant whose ΔW is a
    product A·B; "linear" and its kin work on the factors themselves: of LoRA alone, of one rank. These depend on how
    each ΔW happens to be split in A and B, as in PEFT, whose definitions they keep to; with rank-stabilized scaling,
    PEFT's results are √rank too strong, and these are not.

    A path that only some adapters have counts as zero in the others. A stacked leaf is combined, pruned and truncated
    layer by layer. The result is `LoRA` of scale 1, with weights and scales in its factors, in the widest dtype of the
    factors; a leaf that trains in `Full` is `base + Σ wᵢ (weightᵢ - base)`, or by `method` likewise.

    Args:
      adapters: What `split` returned second, or `load`; all trained from one frozen tree.
      weights: A number for each, of any sign; may be traced.
      method: One of the table.
      rank: Of "svd" and its kin: the rank of the result, at most, since it is no more than the sum's; None for the
        largest rank that is combined.
      density: Of all that prune: the share of entries that is kept, for each leaf and layer; 1 for all.
      majority: Of "ties" and its kin: whether the sign is that of the sum ("total") or most adapters' ("frequency").
      key: Of "dare_linear" and its kin: a PRNG key.
      base: The frozen tree, where leaves train in `Full`.

    Returns:
      `lora_params`, for `attach` and `merge`; without dropout, which the adapters need not have in common.

    Raises:
      ValueError: An option is missing, has no effect or makes no sense; or, with the path, adapters do not go together.

    Source: Yadav et al. 2023 (TIES), https://arxiv.org/abs/2306.01708; Yu et al. 2023 (DARE),
    https://arxiv.org/abs/2311.03099; `add_weighted_adapter` in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> a = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=1)})[1]
    >>> b = lora.split(jax.random.key(1), params, {"w": lora.LoRA(rank=2, alpha=8)})[1]
    >>> lora.combine([a, b], [0.7, 0.3])["w"].variant.rank
    3
    >>> lora.combine([a, b], [0.7, 0.3], method="svd", rank=2)["w"].variant.rank
    2
    """
    how = _How(method, rank, density, majority, key)
    adapters = [together(one) for one in adapters]
    numbers = _weights(adapters, weights)
    leaves = None if base is None else tree.flatten(base)[0]
    combined = LoraParams()
    for path in dict.fromkeys(path for one in adapters for path in one):
        having = [i for i, one in enumerate(adapters) if path in one]
        own, of_own = [adapters[i][path] for i in having], jnp.stack([numbers[i] for i in having])
        _check_alike(path, own)
        if isinstance(own[0].variant, Full):
            combined[path] = _full(path, own, of_own, how, leaves)
        elif method in RECIPES:
            combined[path] = _by_factor(path, own, of_own, how)
        else:
            parts = [low_rank(path, adapter) for adapter in own]
            combined[path] = _by_product(path, parts, of_own, how)
    return combined


def _by_product(path: str, parts: Sequence[LowRank], weights: jax.Array, how: _How) -> Adapter:
    """By the ΔW of each part: side by side, and cut off by their singular values if asked for."""
    site = parts[0].site
    dtype = jnp.dtype(wider(*(part.dtype for part in parts))).name
    wide = wider(dtype, jnp.float32)
    weights = weights.astype(wide)
    if how.method.endswith("_svd"):
        deltas = [matmul(part.a, part.b).astype(wide) for part in parts]
        mixed = how.blend(path, "delta", deltas, weights, len(site.batch_axes))
        svd = SVD(*jnp.linalg.svd(mixed, full_matrices=False))
    else:
        a = jnp.concatenate([part.a.astype(wide) for part in parts], axis=-1)
        b = jnp.concatenate([part.b.astype(wide) * w for part, w in zip(parts, weights, strict=True)], axis=-2)
        whole = LowRank(a, b, site, dtype)
        if how.method == "cat":
            return lora_adapter(a, b, site, LoRA(whole.rank, dtype=dtype))
        svd = whole.svd()
    rank = min(how.rank or max(part.rank for part in parts), svd.s.shape[-1])
    return truncated(svd, site, LoRA(rank, dtype=dtype))


def _by_factor(path: str, adapters: Sequence[Adapter], weights: jax.Array, how: _How) -> Adapter:
    """By A and B, each by itself."""
    variants = [adapter.variant for adapter in adapters]
    plain = [variant for variant in variants if is_plain(variant)]
    if len(plain) < len(variants) or len({variant.rank for variant in plain}) > 1:
        found = ", ".join(f"{type(v).__name__} of rank {getattr(v, 'rank', None)}" for v in variants)
        raise ValueError(
            f"{path!r} has {found}: {how.method!r} takes LoRAs of one rank, whose factors it works on; "
            "'cat', 'svd' and those that end in '_svd' take others, and `resize` changes the rank"
        )
    scales = weights * jnp.array([variant.scale for variant in plain], weights.dtype)
    roots = jnp.sqrt(jnp.abs(scales))
    dtype = wider(*(x.dtype for adapter in adapters for x in adapter.factors.values()))
    blended = {}
    for name, own in {"A": jnp.where(scales < 0, -roots, roots), "B": roots}.items():
        tensors = [jnp.asarray(adapter.factors[name], wider(dtype, jnp.float32)) for adapter in adapters]
        blended[name] = how.blend(path, name, tensors, own, len(adapters[0].site.batch_axes)).astype(dtype)
    return Adapter(blended, LoRA(plain[0].rank, dtype=dtype.name), adapters[0].site)


def _full(
    path: str, adapters: Sequence[Adapter], weights: jax.Array, how: _How, leaves: Mapping[str, Any] | None
) -> Adapter:
    """By the differences from the base; the result is the leaf again."""
    if leaves is None or path not in leaves:
        where = "combine was given no base" if leaves is None else "the base has no such leaf"
        raise ValueError(
            f"{path!r} trains in Full, which holds the leaf itself and not its difference from the base, and {where}: "
            "pass base=, the frozen tree, or leave the path out of the adapters"
        )
    arrays = [adapter.factors["weight"] for adapter in adapters]
    before = leaves[path]
    wide = wider(before.dtype, jnp.float32, *(x.dtype for x in arrays))
    before = jnp.asarray(before, wide)
    if before.shape != arrays[0].shape:
        raise ValueError(f"{path!r} has shape {arrays[0].shape}, but the base has {before.shape} there: pass its own")
    moved = how.blend(path, "weight", [jnp.asarray(x, wide) - before for x in arrays], weights, 0)
    dtype = wider(*(x.dtype for x in arrays))
    return Adapter({"weight": (before + moved).astype(dtype)}, adapters[0].variant, adapters[0].site)


def _weights(adapters: Sequence[Any], weights: Any) -> list[jax.Array]:
    """A scalar for each adapter."""
    numbers = [jnp.asarray(w, jnp.result_type(float)) for w in weights]
    if not adapters or len(numbers) != len(adapters) or any(w.ndim for w in numbers):
        raise ValueError(f"combine takes one weight for each adapter, not {len(numbers)} for {len(adapters)}")
    if not all(isinstance(w, jax.core.Tracer) or math.isfinite(w) for w in numbers):
        raise ValueError(f"combine(weights={list(map(float, numbers))}): weights are finite")
    return numbers


def _check_alike(path: str, adapters: Sequence[Adapter]) -> None:
    """Adapters of one leaf have its shape and axes in common, and either replace it or add to it."""
    first = adapters[0]
    for other in adapters[1:]:
        if (first.site.shape, first.site.axes()) != (other.site.shape, other.site.axes()):
            found = " and ".join(
                f"{s.shape} with axes {s.batch_axes, s.in_axes, s.out_axes}" for s in (first.site, other.site)
            )
            raise ValueError(
                f"{path!r}: the adapters were made for different leaves, {found}: split both for one model"
            )
        if isinstance(first.variant, Full) != isinstance(other.variant, Full):
            names = " and ".join(type(x.variant).__name__ for x in (first, other))
            raise ValueError(
                f"{path!r} has {names}, and what replaces a leaf does not go together with what adds to it: `extract` "
                "a LoRA from the base and the leaf that Full trained"
            )

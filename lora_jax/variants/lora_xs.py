"""LoRA-XS: a small square matrix between two frozen factors, which are the weight's own singular vectors."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.axes import Axis
from lora_jax.contract import wider
from lora_jax.matrices import to_matrices
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import FROZEN, Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_fits, check_has_values


@dataclasses.dataclass(frozen=True)
class LoRAXS(Variant):
    """LoRA of extremely few parameters: y = x·W + s·((x·A)·R)·B, with A = U·Σ and B = Vᵀ of W's first singular values.

    R is (rank, rank) and trains; A, as LoRA's, and B are frozen, and are in `lora_params` and its files with it. R
    begins as zero (in the paper as noise of 1e-5, so that nothing is lost: R's gradient does not vanish there).

    A training step of n inputs costs 4ndk + 4nr(d + k) + 6nr² FLOPs at a kernel (d, k), of which 4ndk are the base's.

    Args:
      rank: The number of singular values; at least 1, at most the smaller side of the weight.
      alpha: The numerator of s = alpha / rank; None for `rank`, that is a scale of 1.
      dtype: The dtype of the factors; the singular values are found in it, or in float32 if that is wider.
      dropout: As in `LoRA`.

    Raises:
      ValueError: For a rank below 1, an alpha that is 0 or not finite, an unknown dtype, a dropout that is no
        probability below 1.

    Source: Bałazy et al. 2024, https://arxiv.org/abs/2405.17604.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.LoRAXS(rank=4)})
    >>> lora.summary(frozen, lora_params).trained
    16
    """

    rank: int
    alpha: float | None = None
    dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def scale(self) -> float:
        """The number s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """A and B from the weight, which stays as it is, and R zero."""
        check_fits(self.rank, site)
        check_has_values(self, weight)
        batch, inner, outer = site.sizes()
        matrices = to_matrices(jnp.asarray(weight), site).astype(wider(self.dtype, "float32"))
        u, values, v = jnp.linalg.svd(matrices, full_matrices=False)
        a = (u[..., : self.rank] * values[..., None, : self.rank]).reshape(*batch, *inner, self.rank)
        b = v[..., : self.rank, :].reshape(*batch, self.rank, *outer)
        r = jnp.zeros((*batch, self.rank, self.rank), self.dtype)
        return weight, {"A": a.astype(self.dtype), "R": r, "B": b.astype(self.dtype)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ir,rs,so->io`, times the scale."""
        batch, inner, outer = site.axes()
        rank, other = rank_axis(self.rank), Axis("other rank", self.rank)
        axes = (*batch, *inner, rank), (*batch, rank, other), (*batch, other, *outer)
        return Network((factors["A"], factors["R"], factors["B"]), axes, self.scale, frozen=frozenset({0, 2}))

    def labels(self) -> dict[str, str]:
        """One label, "R"; A and B are frozen."""
        return {"A": FROZEN, "R": "R", "B": FROZEN}

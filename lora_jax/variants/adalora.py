"""AdaLoRA: A·diag(E)·B, whose entries of E are pruned to a budget that all leaves share (see `lora_jax.budget`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_fits, check_number


@dataclasses.dataclass(frozen=True)
class AdaLoRA(Variant):
    """Adaptive budget allocation: y = x·W + s·((x·A)∘E)·B, s = alpha / rank, as a singular value decomposition is.

    A and B are as LoRA's, both random; E, (rank,), begins as zero, and has the weight's batch axes too. `orthogonality`
    of `lora_jax.budget`, added to the loss, keeps A's columns and B's rows orthonormal; `allocate` there sets those
    entries of E to zero that matter least, of all leaves together. Shapes never change.

    A training step of n inputs costs 4ndk + 6nr(d + k) + 4nr FLOPs at a kernel (d, k), of which 4ndk are the base's.

    Args:
      rank: The number of entries of E to begin with; at least 1, at most the smaller side of the weight.
      alpha: The scale's numerator; None for `rank`, that is a scale of 1.
      deviation: The standard deviation of A's and B's normal distributions.
      dtype: The dtype of the factors.
      dropout: As in `LoRA`.

    Raises:
      ValueError: For a rank below 1, an alpha that is 0 or not finite, a deviation that is not positive, an
        unknown dtype, a dropout that is no probability below 1.

    Source: Zhang et al. 2023, https://arxiv.org/abs/2303.10512.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.AdaLoRA(rank=4)})
    >>> {name: a.shape for name, a in lora_params["w"].factors.items()}
    {'A': (64, 4), 'E': (4,), 'B': (4, 32)}
    """

    rank: int
    alpha: float | None = None
    deviation: float = dataclasses.field(default=0.02, compare=False)
    dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        check_number(self, "deviation", lambda x: x > 0, "the deviation is positive, or nothing would ever train")

    @property
    def scale(self) -> float:
        """The number s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """A and B random and E zero; the weight stays as it is."""
        check_fits(self.rank, site)
        batch, inner, outer = site.sizes()
        draw, keys = jax.nn.initializers.normal(self.deviation), jax.random.split(key)
        dtype = jnp.dtype(self.dtype)
        a, b = draw(keys[0], (*batch, *inner, self.rank), dtype), draw(keys[1], (*batch, self.rank, *outer), dtype)
        return weight, {"A": a, "E": jnp.zeros((*batch, self.rank), dtype), "B": b}

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ir,r,ro->io`, times the scale."""
        batch, inner, outer = site.axes()
        rank = (rank_axis(self.rank),)
        axes = batch + inner + rank, batch + rank, batch + rank + outer
        return Network((factors["A"], factors["E"], factors["B"]), axes, self.scale)

    def labels(self) -> dict[str, str]:
        """Three labels, "A", "E" and "B"."""
        return {"A": "A", "E": "E", "B": "B"}

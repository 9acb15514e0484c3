"""LoRA: ΔW = s·A·B, with s = alpha / rank, or alpha / √rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.initial.names import named
from lora_jax.initial.start import Initialization, started
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_fits
from lora_jax.variants.initializers import initializer


@dataclasses.dataclass(frozen=True)
class LoRA(Variant):
    """Low-rank adaptation: y = x·W + s·(x·A)·B, with W frozen, A random and B zero at the start.

    A has the weight's batch axes, its in axes and the rank; B the batch axes, the rank and the out axes: of a kernel
    (in, out), A is (in, rank) and B is (rank, out). Both are kept in `dtype`, and cast at use to the dtype that the
    function computes in.

    A training step of n inputs costs 4ndk + 6nr(d + k) FLOPs at a kernel (d, k), of which 4ndk are the base's.

    Args:
      rank: The number of columns of A and rows of B; at least 1, at most the smaller side of the weight.
      alpha: The scale's numerator; None for `rank`, that is a scale of 1 (or √rank).
      scaling: "standard", s = alpha / rank, or "rank_stabilized", s = alpha / √rank.
      init: How the factors begin. With A drawn and B zero: "normal", of variance 1 / inputs; "uniform", U(±1/√inputs),
        as PEFT draws it; or a function `(key, shape, dtype) -> array`. An embedding's A, whose rows are picked and not
        summed, counts `rank` inputs. With what they begin as taken out of the base, which `split` then changes:
        "orthogonal", "pissa", "pissa_niter_4" (PiSSA by 4 rounds of approximation), "olora", or an `Initialization`.
        Rules that `eva`, `corda`, `lora_ga` and `loftq` make bring their own.
      dtype: The dtype of A and B.
      dropout: The probability that an input of A is dropped in training, where the loss calls `lora_jax.dropout`.

    Raises:
      ValueError: For a rank below 1, an alpha that is 0 or not finite, an unknown scaling or dtype, a dropout that is
        no probability below 1.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.

    >>> LoRA(rank=8, alpha=16).scale
    2.0
    """

    rank: int
    alpha: float | None = None
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    init: str | Callable[..., jax.Array] | Initialization = dataclasses.field(default="normal", compare=False)
    dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(self)
        if self.scaling not in ("standard", "rank_stabilized"):
            name = type(self).__name__
            raise ValueError(f"{name}(scaling={self.scaling!r}): the scaling is 'standard' or 'rank_stabilized'")

    @property
    def scale(self) -> float:
        """The number s that multiplies A·B."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.scaling == "rank_stabilized" else self.rank)

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """What `init` says: A random, B zero, and the weight as it is; or else factors that the weight is less by."""
        batch, inner, outer = site.sizes()
        check_fits(self.rank, site)
        how = named(self.init) if isinstance(self.init, str) else self.init
        if isinstance(how, Initialization):
            return started(how, key, weight, site, self.rank, self.scale, self.dtype)
        fan_in = self.rank if site.kind == "embedding" else math.prod(inner)
        draw = how or initializer(str(self.init), fan_in)
        shape = (*batch, *inner, self.rank)
        a = jnp.asarray(draw(key, shape, self.dtype), self.dtype)
        if a.shape != shape:
            raise ValueError(f"init returned an array of shape {a.shape} for A, which is {shape}")
        return weight, {"A": a, "B": jnp.zeros((*batch, self.rank, *outer), self.dtype)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ir,ro->io`, times the scale; batch axes are A's and B's both."""
        batch, inner, outer = site.axes()
        rank = (rank_axis(self.rank),)
        return Network((factors["A"], factors["B"]), (batch + inner + rank, batch + rank + outer), self.scale)

    def labels(self) -> dict[str, str]:
        """Two labels, "A" and "B"."""
        return {"A": "A", "B": "B"}

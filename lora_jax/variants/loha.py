"""LoHa: ΔW is the element-wise product of two low-rank matrices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.axes import Axis
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant, rank_axis
from lora_jax.variants.hyperparameters import check, check_fits
from lora_jax.variants.initializers import drawn


@dataclasses.dataclass(frozen=True)
class LoHa(Variant):
    """Low-rank Hadamard product: y = x·W + s·x·((A1·B1)∘(A2·B2)), s = alpha / rank; B2 begins as zero.

    ΔW has rank up to r², at twice LoRA's parameters. The product of A1 and A2, row by row, has r² columns, and so x is
    multiplied by it as by the A of a LoRA of rank r²:

    A training step of n inputs costs 4ndk + 6nr²(d + k) + 5r²(d + k) FLOPs at a kernel (d, k), of which 4ndk are the
    base's. Above a rank of about √(dk / (d + k)) it would be cheaper to form ΔW, which is what
    `lift(strategy="hybrid")` then does.

    Args:
      rank: The number of columns of A1 and of A2; at least 1, at most the smaller side of the weight.
      alpha: The scale's numerator; None for `rank`, that is a scale of 1.
      init: How A1 and A2 begin, as LoRA's A; B1 begins likewise, with `rank` inputs.
      dtype: The dtype of the factors.
      dropout: As in `LoRA`.

    Raises:
      ValueError: For a rank below 1, an alpha that is 0 or not finite, an unknown dtype, a dropout that is no
        probability below 1.

    Source: Hyeon-Woo et al. 2021, FedPara, https://arxiv.org/abs/2108.06098; Yeh et al. 2023, LyCORIS,
    https://arxiv.org/abs/2309.14859.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((64, 32))}, {"w": lora.LoHa(rank=4)})
    >>> {name: a.shape for name, a in lora_params["w"].factors.items()}
    {'A1': (64, 4), 'B1': (4, 32), 'A2': (64, 4), 'B2': (4, 32)}
    """

    rank: int
    alpha: float | None = None
    init: str | Callable[..., jax.Array] = dataclasses.field(default="normal", compare=False)
    dtype: str = "float32"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def scale(self) -> float:
        """The number s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """All random but B2, which is zero; the weight stays as it is."""
        check_fits(self.rank, site)
        batch, inner, outer = site.sizes()
        fan_in = self.rank if site.kind == "embedding" else math.prod(inner)
        keys, factors = jax.random.split(key, 3), Factors()
        for name, own, shape, inputs in zip(
            ("A1", "B1", "A2"),
            keys,
            ((*inner, self.rank), (self.rank, *outer), (*inner, self.rank)),
            (fan_in, self.rank, fan_in),
            strict=True,
        ):
            factors[name] = drawn(self.init, own, batch + shape, self.dtype, inputs)
        return weight, {**factors, "B2": jnp.zeros((*batch, self.rank, *outer), self.dtype)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """`ir,ro,is,so->io`, times the scale."""
        batch, inner, outer = site.axes()
        ranks = rank_axis(self.rank), Axis("other rank", self.rank)
        axes = [side for rank in ranks for side in ((*batch, *inner, rank), (*batch, rank, *outer))]
        return Network(tuple(factors[name] for name in ("A1", "B1", "A2", "B2")), tuple(axes), self.scale)

    def labels(self) -> dict[str, str]:
        """Two labels: "A" for what meets the inputs, "B" for what makes the outputs."""
        return {"A1": "A", "B1": "B", "A2": "A", "B2": "B"}

"""IA³: each output, or each input, of a layer is scaled."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.factored import Factored
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant
from lora_jax.variants.hyperparameters import check


@dataclasses.dataclass(frozen=True)
class IA3(Variant):
    """Infused adapter by inhibiting and amplifying inner activations: y = x·(W∘l), with one number for each output.

    The one factor, `scale`, begins as ones: it has the weight's batch axes and its out axes, or its in axes. It scales
    the leaf alone: a bias is a leaf of its own, which PEFT scales along with the outputs of its layer.

    A training step of n inputs costs 4ndk + 4nk FLOPs at a kernel (d, k), of which 4ndk are the base's; 4ndk + 4nd if
    the inputs are scaled.

    Args:
      side: "out", as the paper scales keys and values, or "in", as it scales the inputs of an MLP's last layer.
      dtype: The dtype of the vector.

    Raises:
      ValueError: For an unknown side, a dtype that is not floating.

    Source: Liu et al. 2022, https://arxiv.org/abs/2205.05638.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 3))}, {"w": lora.IA3()})
    >>> lora_params["w"].factors["scale"]
    Array([1., 1., 1.], dtype=float32)
    """

    side: Literal["out", "in"] = "out"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.side not in ("out", "in"):
            raise ValueError(f"IA3(side={self.side!r}): the side is 'out' or 'in'")
        check(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """All; but a convolution with inputs scaled, at each place of its window, would have to form its kernel."""
        return super().kinds if self.side == "out" else ("linear", "embedding")

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """Ones."""
        batch, inner, outer = site.sizes()
        return weight, {"scale": jnp.ones(batch + (outer if self.side == "out" else inner), self.dtype)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """The vector alone, which multiplies the base."""
        batch, inner, outer = site.axes()
        return Network((factors["scale"],), (batch + (outer if self.side == "out" else inner),))

    def apply(self, base: Factored, factors: Factors, site: Site) -> Factored:
        """The base, scaled."""
        vector = self.delta(factors, site)
        return dataclasses.replace(base.times(vector.operands[0], vector.axes[0]), adapted=True)

    def undo(self, merged: Factored, factors: Factors, site: Site) -> Factored:
        """The merged weight, divided; what was scaled to zero is lost, and is not finite then."""
        return self.apply(merged, {"scale": 1 / factors["scale"]}, site)

    def labels(self) -> dict[str, str]:
        """One label, "scale"."""
        return {"scale": "scale"}

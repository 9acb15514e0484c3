"""Full: the leaf itself trains."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.axes import weight_axes
from lora_jax.factored import Factored
from lora_jax.materialize import total
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, Variant
from lora_jax.variants.hyperparameters import check

WEIGHT = "weight"


@dataclasses.dataclass(frozen=True)
class Full(Variant):
    """Train the leaf itself: heads, norms, biases; any shape.

    The one factor, `weight`, starts as a copy of the leaf and takes its place. Merged, it cannot be taken out again:
    the base's own value is in `frozen` alone.

    Args:
      dtype: The dtype to train in; None for the leaf's own.

    Raises:
      ValueError: For a dtype that is not floating.

    Source: `modules_to_save` in Hugging Face PEFT.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"bias": jnp.ones(3)}, {"bias": lora.Full()})
    >>> lora_params["bias"].factors["weight"]
    Array([1., 1., 1.], dtype=float32)
    """

    dtype: str | None = None
    invertible: ClassVar[bool] = False
    needs_axes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """A copy of the leaf, so that neither is lost when the other's buffer is donated."""
        dtype = self.dtype or weight.dtype
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError("Full copies the leaf, and this one has no values: split inside jax.eval_shape")
        return weight, {"weight": jnp.array(weight, jax.dtypes.canonicalize_dtype(dtype), copy=True)}

    def delta(self, factors: Factors, site: Site) -> Network:
        """The factor alone, over all axes of the leaf."""
        return Network((factors["weight"],), (weight_axes(site.shape),))

    def apply(self, base: Factored, factors: Factors, site: Site) -> jax.Array:
        """The factor in the base's place, in the leaf's dtype."""
        return total(dataclasses.replace(base, base=None).add(self.delta(factors, site)))

    def labels(self) -> dict[str, str]:
        """One label, "weight"."""
        return {"weight": WEIGHT}

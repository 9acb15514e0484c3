"""DoRA: W + s·A·B with each column's length trained apart from its direction."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import Axes, Axis, weight_axes
from lora_jax.contract import contract, wider
from lora_jax.factored import Factored
from lora_jax.sites import Site
from lora_jax.variants.base import Factors, rank_axis
from lora_jax.variants.hyperparameters import check_has_values
from lora_jax.variants.lora import LoRA


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: y = x·(m / ‖V‖ ∘ V), V = W + s·A·B.

    The norm ‖V‖ is over the in axes, one for each entry along the out axes (of an embedding, one for each feature over
    the vocabulary); m, the factor `magnitude`, begins as ‖W‖. As in the paper's section 4.3 no gradient flows through
    ‖V‖, which is found without V, in float32, once for each `attach`:

        ‖V‖² = ‖W‖² + 2s·Σ (WᵀA)∘Bᵀ + s²·Σ (B∘(AᵀA)B)

    A column that is zero counts as of length 1, so it trains, where m / ‖V‖ would be 0 / 0.

    Beyond LoRA's 4ndk + 6nr(d + k), a training step of n inputs costs 2drk + 2dk + 2dr² + 2kr² FLOPs for the norm and
    4nk for the scaling, at a kernel (d, k).

    Args:
      rank: As in `LoRA`.
      alpha: As in `LoRA`.
      scaling: As in `LoRA`.
      init: As in `LoRA`.
      dtype: The dtype of A, B and the magnitude.
      dropout: As in `LoRA`; the base's part, which the norm scales too, is not dropped.

    Raises:
      ValueError: As `LoRA`.

    Source: Liu et al. 2024, https://arxiv.org/abs/2402.09353.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": 2 * jnp.eye(8)}, {"w": lora.DoRA(rank=2)})
    >>> lora_params["w"].factors["magnitude"]
    Array([2., 2., 2., 2., 2., 2., 2., 2.], dtype=float32)
    """

    invertible: ClassVar[bool] = False

    def initial(self, key: jax.Array, weight: Any, site: Site) -> tuple[Any, Factors]:
        """A and B as LoRA's, and the norms of what they and the frozen weight make."""
        check_has_values(self, weight)
        weight, factors = super().initial(key, weight, site)
        return weight, {**factors, "magnitude": jnp.sqrt(self._squares(weight, factors, site)).astype(self.dtype)}

    def apply(self, base: Factored, factors: Factors, site: Site) -> Factored:
        """V, scaled along the out axes."""
        batch, _, outer = site.axes()
        (weight,) = base.terms[0].operands
        squares = self._squares(weight, factors, site)
        one = jnp.ones_like(squares)
        norms = jnp.sqrt(jnp.where(squares == 0, one, squares))
        scale = jnp.where(squares == 0, one, factors["magnitude"].astype(norms.dtype) / norms)
        return base.add(self.delta(factors, site)).times(scale, batch + outer)

    def axes(self, site: Site) -> dict[str, Axes]:
        """A's and B's, and the magnitude's, which are the weight's out axes."""
        batch, _, outer = site.axes()
        return {**super().axes(site), "magnitude": batch + outer}

    def labels(self) -> dict[str, str]:
        """Three labels, "A", "B" and "magnitude"."""
        return {**super().labels(), "magnitude": "magnitude"}

    def _squares(self, weight: Any, factors: Factors, site: Site) -> jax.Array:
        """‖V‖² over the in axes, as a constant to differentiation: ‖W‖² + Σ B∘(2s·AᵀW + s²·(AᵀA)·B) over the rank."""
        w, a, b = (lax.stop_gradient(jnp.asarray(x)) for x in (weight, factors["A"], factors["B"]))
        wide = wider(w.dtype, self.dtype, "float32")
        exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": wide}
        # Along the weight's own axes: of two made one, a mesh could split the first alone, and would gather the other.
        batch, inner, outer = site.axes()
        r, r2 = (rank_axis(self.rank),), (Axis("other rank", self.rank),)
        w_axes, a_axes, b_axes, kept = weight_axes(site.shape), batch + inner + r, batch + r + outer, batch + outer

        def projection(w: jax.Array, a: jax.Array) -> jax.Array:
            # In the weight's own dtype, so that no wider copy of it is made, but added up in the wide one.
            return contract([(a.astype(w.dtype), a_axes), (w, w_axes)], b_axes, **exact)

        def widened(w: jax.Array, a: jax.Array) -> jax.Array:
            return projection(w.astype(wide), a)

        # On a CPU, XLA makes a wider copy itself, or fails to.
        projected = (
            projection(w, a) if w.dtype == wide else lax.platform_dependent(w, a, cpu=widened, default=projection)
        )
        a, b = a.astype(wide), b.astype(wide)
        gram = contract([(a, a_axes), (a, batch + inner + r2)], batch + r + r2, **exact)
        crossed = contract([(gram, batch + r + r2), (b, batch + r2 + outer)], b_axes, **exact)
        both = 2 * self.scale * projected + self.scale**2 * crossed
        squares = contract([(w, w_axes), (w, w_axes)], kept, **exact) + contract([(both, b_axes), (b, b_axes)], kept)
        return jnp.maximum(squares, 0)  # rounding alone could make it negative

"""LoRA-FA: LoRA whose A is frozen, and the gradient of B that this asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.contract import contract, wider
from lora_jax.network import Network
from lora_jax.sites import Site
from lora_jax.variants.base import FROZEN, Factors
from lora_jax.variants.lora import LoRA


@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with a frozen A: y = x·W + s·(x·A)·B, where B alone trains, and x need not be kept for A's gradient.

    `lora_jax.fa_gradients` corrects the gradient of B.

    A training step of n inputs costs 4ndk + 4nrd + 6nrk FLOPs at a kernel (d, k), of which 4ndk are the base's.

    Args:
      rank: As in `LoRA`.
      alpha: As in `LoRA`.
      scaling: As in `LoRA`.
      init: As in `LoRA`.
      dtype: As in `LoRA`.
      dropout: As in `LoRA`.

    Raises:
      ValueError: As `LoRA`.

    Source: Zhang et al. 2023, https://arxiv.org/abs/2308.03303.

    >>> LoRAFA(rank=8, alpha=16).labels()
    {'A': 'frozen', 'B': 'B'}
    """

    def delta(self, factors: Factors, site: Site) -> Network:
        """As LoRA's, and A is frozen."""
        return dataclasses.replace(super().delta(factors, site), frozen=frozenset({0}))

    def labels(self) -> dict[str, str]:
        """B trains, and A is frozen."""
        return {"A": FROZEN, "B": "B"}

    def corrected(self, gradient: jax.Array, factors: Factors, site: Site, damping: float) -> jax.Array:
        """The gradient of B that moves ΔW as near as A lets it to where a gradient of W would: s⁻²·(AᵀA + δI)⁻¹·g."""
        batch, inner, outer = site.axes()
        a_axes, b_axes = self.delta(factors, site).axes
        rank, other = a_axes[-1], dataclasses.replace(a_axes[-1], name="other rank")
        exact: dict[str, Any] = {"precision": lax.Precision.HIGHEST}
        a, g = (x.astype(wider(x.dtype, "float32")) for x in (factors["A"], gradient))
        gram = contract([(a, a_axes), (a, (*batch, *inner, other))], (*batch, rank, other), **exact)
        rows = g.reshape(*g.shape[: len(batch) + 1], -1)
        solved = jnp.linalg.solve(gram + damping * jnp.eye(self.rank, dtype=gram.dtype), rows)
        return (solved.reshape(g.shape) / self.scale**2).astype(gradient.dtype)

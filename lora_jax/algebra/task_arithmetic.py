"""Task arithmetic: one tensor from those of several tasks, pruned by size or at random, with or without a vote."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.explicit import whole


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the tensors of several tasks become one.

    Attributes:
      prune: Whether each keeps all its entries, those of largest magnitude, or some at random, made larger so that the
        expectation stays.
      elect: Whether each entry is the mean of those tasks alone that have the sign most have, and not the sum of all.
    """

    prune: Literal["magnitude", "random"] | None = None
    elect: bool = False

    def __call__(
        self,
        tensors: Sequence[jax.Array],
        weights: jax.Array,
        *,
        density: float | None = None,
        majority: Literal["total", "frequency"] = "total",
        key: jax.Array | None = None,
        batch: int = 0,
    ) -> jax.Array:
        """The tensors as one.

        Args:
          tensors: One for each task, all of one shape and dtype.
          weights: One number for each.
          density: The share of entries that pruning keeps.
          majority: What the vote counts: sums ("total") or signs ("frequency"), before weights.
          key: For pruning at random.
          batch: How many leading dimensions are stacked layers or experts, each pruned by itself.
        """
        if self.prune == "magnitude" and density is not None:
            tensors = [largest(tensor, density, batch) for tensor in tensors]
        elif self.prune == "random" and density is not None and key is not None:
            keys = jax.random.split(key, len(tensors))
            tensors = [at_random(key, tensor, density) for key, tensor in zip(keys, tensors, strict=True)]
        stacked = jnp.stack(tensors)
        weighted = stacked * weights.astype(stacked.dtype).reshape(-1, *(1,) * (stacked.ndim - 1))
        if not self.elect:
            return weighted.sum(0)
        agrees = agreement(stacked, majority)
        return jnp.where(agrees, weighted, 0).sum(0) / jnp.maximum(agrees.sum(0), 1).astype(stacked.dtype)


RECIPES = {
    "linear": Recipe(),
    "magnitude_prune": Recipe(prune="magnitude"),
    "ties": Recipe(prune="magnitude", elect=True),
    "dare_linear": Recipe(prune="random"),
    "dare_ties": Recipe(prune="random", elect=True),
}


def largest(tensor: jax.Array, density: float, batch: int = 0) -> jax.Array:
    """The tensor with all but its ⌊density · size⌋ entries of largest magnitude zero, for each entry of the batch.

    >>> largest(jnp.array([0.5, -3.0, 1.0, 2.0]), 0.5)
    Array([ 0., -3.,  0.,  2.], dtype=float32)
    """
    flat = whole(tensor).reshape(*tensor.shape[:batch], -1)
    _, kept = lax.top_k(jnp.abs(flat), int(density * flat.shape[-1]))
    mask = jnp.put_along_axis(jnp.zeros(flat.shape, bool), kept, True, axis=-1, inplace=False)
    return jnp.where(mask, flat, 0).reshape(tensor.shape)


def at_random(key: jax.Array, tensor: jax.Array, density: float) -> jax.Array:
    """The tensor with each entry kept with probability `density` and divided by it, or else zero."""
    kept = jax.random.bernoulli(key, density, tensor.shape)
    return jnp.where(kept, tensor / density, 0)


def agreement(tensors: jax.Array, majority: Literal["total", "frequency"] = "total") -> jax.Array:
    """Which entries have the sign that most tasks have there, by their sum or by their number; zeros have none.

    >>> agreement(jnp.array([[1.0, -1.0], [-3.0, 0.0]]))
    Array([[False,  True],
           [ True, False]], dtype=bool)
    """
    signs = jnp.sign(tensors)
    elected = (tensors if majority == "total" else signs).sum(0) >= 0
    return jnp.where(elected, signs == 1, signs == -1)

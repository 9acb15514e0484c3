"""Task: a model, its parameters or their shapes, and what training minimizes and evaluation measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.formats.names import Names


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Predicts each next token.

    Attributes:
      model: A decoder.
      names: Where its leaves are in Hugging Face's modules.
      recompute: Whether the head is adapted; see `lora_jax.recipes.cross_entropy`.
    """

    model: Any
    names: Names
    recompute: bool = False

    peft = "CAUSAL_LM"

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Mean cross-entropy of the tokens that count, in nats."""
        segments = batch["segment_ids"]
        return self.model.apply(
            params, batch["input_ids"], batch["mask"], segments > 0, segments, method="loss", recompute=self.recompute
        )

    @staticmethod
    def weight(batch: Mapping[str, jax.Array]) -> jax.Array:
        """How many tokens count."""
        return jnp.sum(batch["mask"])

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """What is shown of an evaluation."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700))}

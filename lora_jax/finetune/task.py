"""Task: a model, its parameters or their shapes, and what training minimizes and evaluation measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import models
from lora_jax.formats.names import Names
from lora_jax.models.classifier import Classifier
from lora_jax.models.decoder import Decoder


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

    def measures(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What an evaluation takes the mean of: the loss."""
        return {"loss": self.loss(params, batch)}

    @staticmethod
    def weight(batch: Mapping[str, jax.Array]) -> jax.Array:
        """How many tokens count."""
        return jnp.sum(batch["mask"])

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """What is shown of an evaluation."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700))}


@dataclasses.dataclass(frozen=True, eq=False)
class Classification:
    """Tells which class a text is of.

    Its batches have input_ids and attention_mask [B, L], labels [B], the number of each text's class or a negative one
    for rows that do not count, and where there are pairs of texts token_type_ids [B, L].

    Attributes:
      model: A classifier.
      names: Where its leaves are in Hugging Face's modules.
    """

    model: Classifier
    names: Names

    peft = "SEQ_CLS"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in their order."""
        return self.model.labels

    def logits(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Logits, float32 [B, labels]."""
        logits: Any = self.model.apply(params, batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids"))
        return logits.astype(jnp.float32)

    def loss(self, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Mean cross-entropy of the rows that count, in nats."""
        return self.measures(params, batch)["loss"]

    def measures(self, params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What an evaluation takes the mean of: the loss, and the accuracy, the share of rows that are right."""
        logits, labels = self.logits(params, batch), batch["labels"]
        counts = labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, labels, 0))
        right = jnp.argmax(logits, axis=-1) == labels
        rows = jnp.sum(counts, dtype=jnp.float32)
        return {
            "loss": jnp.sum(losses, where=counts) / rows,
            "accuracy": jnp.sum(right, where=counts, dtype=jnp.float32) / rows,
        }

    @staticmethod
    def weight(batch: Mapping[str, jax.Array]) -> jax.Array:
        """How many rows count."""
        return jnp.sum(batch["labels"] >= 0)

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """What is shown of an evaluation."""
        return {**means}


Task = LanguageModel | Classification


def of(model: Any, **options: Any) -> Task:
    """The task of a model: a decoder's is to predict tokens, a classifier's to tell classes apart.

    Args:
      model: The module.
      **options: Fields of `LanguageModel` that it has besides.

    Raises:
      ValueError: It has none.

    >>> from lora_jax.models.bert import Config
    >>> of(Classifier(Config(100, 8, 1, 2, 16), labels=("no", "yes"))).labels
    ('no', 'yes')
    """
    if isinstance(model, Classifier):
        return Classification(model, models.names(model))
    if not isinstance(model, Decoder):
        kind = type(model).__name__
        raise ValueError(f"{kind} is an encoder, which learns to classify here: give data with a label for each text")
    return LanguageModel(model, models.names(model), **options)

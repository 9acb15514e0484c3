"""The demo's task: a classifier, the sentences that it learns from and is tested on, and what is computed with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lora_jax.demo.batches import Batch, Bucket
from lora_jax.models.bert import Bert
from lora_jax.models.classifier import Classifier, mean_pool


class Task(NamedTuple):
    """The classifier, its parameters with a fresh head, and the sentences: in buckets, and their labels in order."""

    model: Classifier
    params: Any
    train: list[Bucket]
    test: list[Bucket]
    train_labels: np.ndarray
    test_labels: np.ndarray

    def logits(self, params: Any, batch: Batch) -> jax.Array:
        """Logits [B, 2]: as written, swapped."""
        logits: Any = self.model.apply(params, batch["input_ids"], batch["attention_mask"])
        return logits

    def features(self, params: Any, batch: Batch) -> jax.Array:
        """What the head sees: the mean of the encoder's hidden states, [B, D]."""
        encoder, mask = {"params": params["params"]["encoder"]}, batch["attention_mask"]
        hidden: Any = Bert(self.model.config).apply(encoder, batch["input_ids"], mask)
        return mean_pool(hidden, mask)

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        """Mean cross-entropy in nats."""
        return cross_entropy(self.logits(params, batch), batch["labels"])

    def loss_of_head(self, params: Any, batch: dict[str, Any]) -> jax.Array:
        """The same from features that are known already: all that it reads of the parameters is the head."""
        head = params["params"]["head"]
        return cross_entropy(batch["features"] @ head["kernel"] + head["bias"], batch["labels"])


def cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    """The batch's mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

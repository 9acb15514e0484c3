"""A sentence classifier: an encoder, the mean of its hidden states over the tokens, and a linear head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.bert import Bert


def mean_pool(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean of hidden states [B, L, D] over the tokens that a mask [B, L] marks: [B, D], zeros where it marks none.

    >>> mean_pool(jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[1, 1, 0]]))
    Array([[2.]], dtype=float32)
    """
    if mask is None:
        return hidden.mean(axis=1)
    wide = hidden.dtype if hidden.dtype.itemsize >= 4 else jnp.float32  # bfloat16 cannot count to 300
    weights = mask.astype(wide)[:, :, None]
    mean = (hidden.astype(wide) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
    return mean.astype(hidden.dtype)


class Classifier(nn.Module):
    """From token ids to logits; `add_head` makes one from a loaded encoder."""

    encoder: Bert
    labels: int

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, labels]; the arguments are as in `Bert`."""
        pooled = mean_pool(self.encoder(input_ids, attention_mask, token_type_ids), attention_mask)
        return self.encoder.dense(self.labels, "head")(pooled)


def add_head(key: jax.Array, encoder: Bert, params: Any, labels: int) -> tuple[Classifier, Any]:
    """Put a freshly drawn head on an encoder, and leave out its pooler, which this classifier does not read.

    Args:
      key: Draws the head's kernel [D, labels]; its bias is zero.
      encoder: The encoder.
      params: Its variables, {"params": ...}; they are shared, not copied.
      labels: How many classes there are.

    Returns:
      The classifier and its variables, {"params": {"encoder": ..., "head": ...}}.

    >>> from lora_jax.models.bert import Config
    >>> encoder, ids = Bert(Config(100, 8, 1, 2, 16)), jnp.array([[1, 5, 9]])
    >>> model, params = add_head(jax.random.key(1), encoder, encoder.init(jax.random.key(0), ids), labels=3)
    >>> model.apply(params, ids).shape
    (1, 3)
    """
    encoder = encoder.clone(config=dataclasses.replace(encoder.config, pooler=False))
    head = encoder.dense(labels, "head").init(key, jnp.zeros((1, encoder.config.hidden_size), encoder.param_dtype))
    kept = {name: value for name, value in params["params"].items() if name != "pooler"}
    return Classifier(encoder, labels), {"params": {"encoder": kept, "head": head["params"]}}

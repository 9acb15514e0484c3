"""What a model of the zoo is: a loss, its parameters and a batch, with what their libraries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

VOCAB, BATCH, LENGTH = 512, 4, 64


class Case(NamedTuple):
    """A model as it is adapted: `loss(params, *batch)`, compared in float32, or in float64 too."""

    loss: Callable[..., jax.Array]
    params: Any
    batch: tuple[Any, ...]
    double: bool = False


def tokens(length: int = LENGTH, vocab: int = VOCAB) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (BATCH, length), 0, vocab)


def images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (BATCH, *shape))


def labels(classes: int) -> jax.Array:
    return jnp.arange(BATCH) % classes


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return cross_entropy(logits[:, :-1], tokens[:, 1:])

"""The cross-entropy of next tokens that never holds tokens × vocabulary, forward or backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    *,
    chunk: int = 512,
    recompute: bool = False,
    softcap: float | None = None,
) -> jax.Array:
    """The mean of -log softmax(x·head)[label], a chunk of tokens at a time; logits are float32.

    The gradients are made along with the value, chunk by chunk, so that no logit is made twice: 4ndV FLOPs for a frozen
    head and 6ndV for one that trains, as without chunks. What is kept is the gradient of x, and of a head that trains.

    Args:
      x: Hidden states, (..., d), floating.
      head: The last layer's weight, (d, V); of a tied embedding, its transpose.
      labels: The right tokens, (...), integers.
      mask: Which tokens count, (...), or how much; all alike by default.
      chunk: How many tokens at a time: chunk × V logits are held.
      recompute: Whether the backward pass makes the logits again instead, 2ndV FLOPs more. Needed where the head is
        adapted, for functions that `lift` lifts, and for derivatives of derivatives.
      softcap: Logits are bent smoothly to lie between this and its negative, as in Gemma 2; None: not at all.

    Returns:
      A float32 scalar; 0 where nothing counts.

    Source: Wijmans et al. 2024, https://arxiv.org/abs/2411.09009; the gradient along with the value is that of Hsu et
    al. 2024, https://arxiv.org/abs/2410.10989.

    >>> import jax, jax.numpy as jnp
    >>> x, head = jnp.ones((2, 3, 4)), jnp.ones((4, 10))
    >>> round(float(cross_entropy(x, head, jnp.zeros((2, 3), int))), 4)  # log 10
    2.3026
    """
    if x.shape[:-1] != labels.shape or head.shape[:1] != x.shape[-1:]:
        raise ValueError(
            f"cross_entropy: x {x.shape}, head {head.shape} and labels {labels.shape} do not fit: they are (..., d), "
            "(d, V) and (...)"
        )
    weights = jnp.ones(labels.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(), 1e-30)
    chunk = min(chunk, labels.size)
    rest = -labels.size % chunk
    rows = x.reshape(-1, x.shape[-1]), labels.ravel(), weights.ravel()
    padded = [jnp.pad(row, [(0, rest)] + [(0, 0)] * (row.ndim - 1)) for row in rows]
    # Chunk i has every n-th token from the i-th on, so that tokens split over devices stay where they are.
    chunks = [jnp.swapaxes(row.reshape(chunk, -1, *row.shape[1:]), 0, 1) for row in padded]
    if not recompute:
        return _with_gradient(softcap, head, *chunks)
    return _scanned(jax.checkpoint(functools.partial(_loss, softcap)), head, *chunks)


def _loss(softcap: float | None, x: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return _of_logits(softcap, _logits(x, head), labels, weights)


def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.matmul(x, head, preferred_element_type=jnp.float32)


def _of_logits(softcap: float | None, logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    right = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits, -1) - right) * weights)


def _scanned(loss: Any, head: jax.Array, x: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    def add(total: jax.Array, row: Any) -> tuple[jax.Array, None]:
        return total + loss(row[0], head, *row[1:]), None

    return lax.scan(add, jnp.zeros(()), (x, labels, weights))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient(softcap: Any, head: jax.Array, x: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    return _scanned(functools.partial(_loss, softcap), head, x, labels, weights)


def _forward(softcap: Any, head: Any, x: Any, labels: Any, weights: Any) -> tuple[jax.Array, Any]:
    if weights.perturbed:
        raise ValueError("cross_entropy: the mask depends on what is differentiated: pass recompute=True")
    of_head = jnp.zeros(head.value.shape, jnp.float32) if head.perturbed else None

    def add(carry: Any, row: Any) -> Any:
        total, of_head = carry
        value, of_logits = jax.value_and_grad(_of_logits, 1)(softcap, _logits(row[0], head.value), *row[1:])
        # As x @ head has it in its own dtype; times float32, XLA makes float32 of the head, and gathers that.
        of_logits = of_logits.astype(jnp.result_type(row[0], head.value))
        (of_x,) = jax.linear_transpose(lambda x: x @ head.value, row[0])(of_logits) if x.perturbed else (None,)
        if of_head is not None:
            (found,) = jax.linear_transpose(lambda head: row[0] @ head, head.value)(of_logits)
            of_head += found.astype(jnp.float32)
        return (total + value, of_head), of_x

    rows = x.value, labels.value, weights.value
    (total, of_head), of_x = lax.scan(add, (jnp.zeros(()), of_head), rows)
    return total, (of_x, None if of_head is None else of_head.astype(head.value.dtype))


def _backward(softcap: Any, saved: Any, g: jax.Array) -> tuple[Any, ...]:
    of_x, of_head = (None if x is None else x * g.astype(x.dtype) for x in saved)
    return of_head, of_x, None, None


_with_gradient.defvjp(_forward, _backward, symbolic_zeros=True)

"""What a block keeps for its backward pass: products that are dear to make again for what they hold, and no more."""

from __future__ import annotations

import math
from typing import Any

CHEAP = 8  # a product is, whose sum is over that many times fewer entries than either side of its result has


def save_products(primitive: Any, *operands: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: x·W and x·A are kept; (x·A)·B, attention and element-wise arithmetic are repeated.

    What an adapter needs of its block is its input, which is element-wise work on products kept anyway, and x·A, of
    rank columns. So the backward pass repeats next to no FLOPs, where `jax.checkpoint` without a policy repeats the
    forward pass; and what is kept of an adapted layer is no more than of one that is not, but for x·A. Logits of a
    vocabulary much wider than the model are not kept either.

    Args:
      primitive: What makes the array in question.
      *operands: The shapes of what it is made of.
      **params: The primitive's parameters.

    Returns:
      Whether the array is kept.

    >>> import jax, jax.numpy as jnp
    >>> block = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x) @ w), policy=save_products)
    >>> str(jax.make_jaxpr(jax.grad(lambda x: block(jnp.ones((8, 8)), x).sum()))(jnp.ones((4, 8)))).count("dot_general")
    2
    """
    if primitive.name != "dot_general":
        return False
    summed, batch = params["dimension_numbers"]
    if any(batch):
        return False
    length = math.prod(operands[0].shape[d] for d in summed[0])
    sides = (math.prod(x.shape) // length for x in operands)
    return CHEAP * length >= min(sides)

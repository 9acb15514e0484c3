"""A leaf of any axes as a stack of matrices, and back."""

from __future__ import annotations

import math

import jax

from lora_jax.contract import reshape, transpose
from lora_jax.sites import Site


def to_matrices(weight: jax.Array, site: Site) -> jax.Array:
    """A leaf as (*batch, in, out), whatever the order and number of its axes.

    >>> import jax.numpy as jnp
    >>> to_matrices(jnp.ones((8, 4, 16)), Site((8, 4, 16), "linear", (), (2,), (0, 1))).shape
    (16, 32)
    """
    batch, inner, outer = site.sizes()
    moved = transpose(weight, (*site.batch_axes, *site.in_axes, *site.out_axes))
    return reshape(moved, (*batch, math.prod(inner), math.prod(outer)))


def from_matrices(matrices: jax.Array, site: Site) -> jax.Array:
    """The inverse of `to_matrices`."""
    order = (*site.batch_axes, *site.in_axes, *site.out_axes)
    moved = reshape(matrices, tuple(site.shape[d] for d in order))
    return transpose(moved, [order.index(d) for d in range(len(order))])

"""Causal attention of tokens that are padded, packed or read in several calls: who sees whom, and the cache.

Shapes in comments: B batch, L length, T slots of a cache (L without one), N layers, H query heads, G heads of keys and
values, K entries of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Cache(NamedTuple):
    """The keys and values of tokens that were read, for those that follow.

    Attributes:
      key: [N, B, T, G, K], and `value` likewise.
      value: See `key`.
      valid: Boolean [B, T], the slots that hold tokens.
      length: How many slots were written, an int32 scalar; padding takes them too.
    """

    key: jax.Array
    value: jax.Array
    valid: jax.Array
    length: jax.Array


class Scope(NamedTuple):
    """What all layers are told of the tokens they read.

    Attributes:
      valid: Boolean [B, T], True at tokens and False at padding; None where there is no padding.
      segments: Integers [B, L], the document that each token is of; None where all of a row are of one.
      start: The slot of the first token, an int32 scalar; None without a cache.
      angles: How far rotary positions turn, [B or 1, L, K / 2], or several of them; None where positions do not turn.
    """

    valid: jax.Array | None = None
    segments: jax.Array | None = None
    start: jax.Array | None = None
    angles: Any = None


def positions_of(valid: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """How many tokens of its segment stand before each token, int32 [B, L]; padding is not counted.

    >>> positions_of(jnp.array([[0, 0, 1, 1, 1]])).tolist()
    [[0, 0, 0, 1, 2]]
    >>> positions_of(jnp.array([[1, 1, 1, 1, 0]]), jnp.array([[1, 1, 2, 2, 2]])).tolist()
    [[0, 1, 0, 1, 1]]
    """
    counts = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    if segments is not None:
        first = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
        counts -= lax.cummax(jnp.where(first, counts - valid.astype(jnp.int32), 0), axis=1)
    return jnp.maximum(counts - 1, 0)


def remember(stores: Any, layer: Any, start: Any, arrays: tuple[jax.Array, ...]) -> tuple[Any, list[jax.Array]]:
    """Write a layer's keys and values [B, L, G, K] into slots from `start` on: the stores, and what the layer has."""
    stores = tuple(
        lax.dynamic_update_slice(store, x[None].astype(store.dtype), (layer, 0, start, 0, 0))
        for store, x in zip(stores, arrays, strict=True)
    )
    dtype = arrays[0].dtype
    return stores, [lax.dynamic_index_in_dim(store, layer, keepdims=False).astype(dtype) for store in stores]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scope: Scope,
    *,
    window: Any = None,
    scale: Any = None,
    softcap: float | None = None,
) -> jax.Array:
    """Mix the values that each token sees: [B, L, H, K] from queries like it, and keys and values [B, T, G, K].

    Args:
      query: Each of its heads looks at the head of keys whose number is its own times G / H, rounded down.
      key: See `query`.
      value: See `query`.
      scope: Which tokens see each other, besides that none sees those after it.
      window: How many tokens one sees, itself and those just before it; None for all, or a traced scalar.
      scale: What scores are multiplied by; None for 1 / √K.
      softcap: Scores are bent smoothly to lie between -softcap and softcap.
    """
    if softcap is not None:
        return _attend_capped(query, key, value, _mask(query.shape[1], key.shape[1], scope, window), scale, softcap)
    plain = all(x is None for x in (scope.valid, scope.segments, scope.start, window))
    mask = None if plain else _mask(query.shape[1], key.shape[1], scope, window)
    return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale, is_causal=plain)


def capped(x: jax.Array, most: float) -> jax.Array:
    """Numbers bent smoothly to lie between -most and most; small ones stay what they are.

    >>> capped(jnp.array([0.1, 100.0]), 10.0).round(3).tolist()
    [0.10000000149011612, 10.0]
    """
    return most * jnp.tanh(x / most)


def _attend_capped(query: Any, key: Any, value: Any, mask: jax.Array, scale: Any, softcap: float) -> jax.Array:
    """As `jax.nn.dot_product_attention`, which bends no scores."""
    batch, length, heads, width = query.shape
    query = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum("blgjk,btgk->bgjlt", query, key, preferred_element_type=jnp.float32)
    scores = capped(scores * (width**-0.5 if scale is None else scale), softcap)
    shares = jax.nn.softmax(jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bgjlt,btgk->blgjk", shares.astype(value.dtype), value).reshape(batch, length, heads, width)


def _mask(length: int, slots: int, scope: Scope, window: Any) -> jax.Array:
    """Whether a token sees a slot, [B or 1, 1, L, T]."""
    start = 0 if scope.start is None else scope.start
    ago = start + jnp.arange(length, dtype=jnp.int32)[:, None] - jnp.arange(slots, dtype=jnp.int32)
    mask = (ago >= 0)[None, None]
    if window is not None:
        mask &= ago < window
    if scope.valid is not None:
        mask &= scope.valid[:, None, None, :]
    if scope.segments is not None:
        mask &= scope.segments[:, None, :, None] == scope.segments[:, None, None, :]
    return mask

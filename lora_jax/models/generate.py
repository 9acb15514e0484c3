"""Generation: a prompt is read at once into a cache, then token after token, greedily or at random."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.models.decoder import Decoder


def generate(
    model: Decoder,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int | None = None,
    top_p: float | jax.Array | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
) -> jax.Array:
    """The tokens that follow each prompt of a batch; the likeliest at each place, or drawn with a key.

    It is compiled once for each model, shapes and options (`temperature` and `top_p` may change freely), and lifts:
    `lora.lift(lambda params: generate(model, params, ids, max_new_tokens=9))(lora.attach(frozen, lora_params))`.

    Args:
      model: Any decoder.
      params: Its variables, {"params": ...}.
      input_ids: Integers [B, L], the prompts.
      attention_mask: [B, L], 1 or True at tokens, 0 or False at padding, at the left or elsewhere, with one token in
        each row at least; None: no padding.
      max_new_tokens: How many tokens are made, fewer where a row ends before.
      key: Draws the tokens; None takes the likeliest.
      temperature: What logits are divided by before one is drawn, above 0.
      top_k: One of so many likeliest tokens is drawn.
      top_p: One of the likeliest is drawn, as few as are so probable together, above 0 and up to 1.
      eos: Tokens that end a row; None for none.
      pad: What stands after the end.

    Returns:
      The new tokens, int32 [B, max_new_tokens], in each row up to an end of those in `eos`, and `pad` after it.

    Raises:
      ValueError: Prompt and new tokens are more than the model has positions, or an option makes no sense.

    >>> from lora_jax.models.llama import Config, Llama
    >>> model, ids = Llama(Config(100, 16, 2, 4, 32)), jnp.array([[0, 5, 9], [1, 7, 2]])
    >>> params = model.init(jax.random.key(0), ids)
    >>> generate(model, params, ids, ids != 0, max_new_tokens=4).shape
    (2, 4)
    >>> generate(model, params, ids, key=jax.random.key(1), top_p=0.9, max_new_tokens=4).shape
    (2, 4)
    """
    longest = model.config.max_position_embeddings
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not shape[1] or max_new_tokens < 1 or shape[1] + max_new_tokens - 1 > longest:
        raise ValueError(
            f"generate: input_ids is {shape} and max_new_tokens {max_new_tokens}: make them [batch, length] and 1 or "
            f"more, {longest + 1} together at most"
        )
    if attention_mask is not None and jnp.shape(attention_mask) != shape:
        raise ValueError(f"generate: attention_mask is {jnp.shape(attention_mask)}: make it {shape}, as input_ids is")
    for name, value, most in (("temperature", temperature, None), ("top_k", top_k, None), ("top_p", top_p, 1)):
        if isinstance(value, (int, float)) and not (value > 0 and (most is None or value <= most)):
            raise ValueError(f"generate: {name} is {value}: make it above 0" + ("" if most is None else ", 1 at most"))
    ends = () if eos is None else tuple(int(end) for end in np.ravel(eos))
    ids, mask = jnp.asarray(input_ids), None if attention_mask is None else jnp.asarray(attention_mask)
    return _generate(model, int(max_new_tokens), top_k, ends, pad, params, ids, mask, key, temperature, top_p)


@functools.partial(jax.jit, static_argnums=range(5))
def _generate(
    model: Decoder,
    number: int,
    top_k: int | None,
    ends: tuple[int, ...],
    pad: int,
    params: Any,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    key: jax.Array | None,
    temperature: Any,
    top_p: Any,
) -> jax.Array:
    batch, length = input_ids.shape
    mask = attention_mask
    if mask is not None:  # what stands before a prompt shifts nothing, whatever stands after it would
        mask = mask.astype(bool)
        order = jnp.argsort(mask, axis=1, stable=True)
        input_ids, mask = (jnp.take_along_axis(x, order, axis=1) for x in (input_ids, mask))

    def chosen(i: Any, logits: jax.Array) -> jax.Array:
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return sample(jax.random.fold_in(key, i), logits, temperature, top_k, top_p)

    def add(i: Any, tokens: jax.Array, done: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        token = jnp.where(done, pad, chosen(i, logits)).astype(jnp.int32)
        tokens = lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        return token, tokens, done | functools.reduce(jnp.logical_or, [token == end for end in ends], done)

    def proceed(state: Any) -> Any:
        i, token, tokens, done, cache = state
        logits, cache = model.apply(params, token[:, None], cache, method="decode")
        return i + 1, *add(i, tokens, done, logits), cache

    cache = model.apply(params, batch, length + number - 1, method="empty_cache")
    logits, cache = model.apply(params, input_ids, cache, mask, method="decode")
    first = add(0, jnp.full((batch, number), pad, jnp.int32), jnp.zeros(batch, bool), logits)
    state = (jnp.int32(1), *first, cache)
    return lax.while_loop(lambda state: (state[0] < number) & ~state[3].all(), proceed, state)[2]


def sample(
    key: jax.Array, logits: jax.Array, temperature: Any = 1.0, top_k: int | None = None, top_p: Any = None
) -> jax.Array:
    """Draw a token from each row of logits [B, V]: int32 [B]. The arguments are as in `generate`.

    >>> sample(jax.random.key(0), jnp.log(jnp.array([[0.5, 0.3, 0.2]])), top_p=0.4)
    Array([0], dtype=int32)
    """
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(falling, axis=-1)
        needed = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p  # the first always
        least = jnp.min(jnp.where(needed, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)

"""What decoders share: a table of tokens, layers that are scanned or not, a last norm and a head; logits, loss, cache.

Shapes in comments: B batch, L length, D hidden_size, V vocab_size; others are as in `lora_jax.models.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.models.attention import Cache, Scope, capped, positions_of
from lora_jax.models.part import Part
from lora_jax.recipes import cross_entropy


class Decoder(Part):
    """Token ids to logits, to the loss of the next tokens, or to the next tokens.

    A model says which module its layers are, and which its last norm is. A layer takes ((x, stores), number, scope) and
    returns ((x, stores), None): hidden states [B, L, D], the cache's keys and values or None, its own number, and a
    `Scope`.

    Attributes:
      remat: Whether the backward pass makes each layer anew (True), all but what a policy of `jax.checkpoint` keeps
        (such as `lora_jax.recipes.save_products`), or nothing (False).
      sharding: Of hidden states [B, L, D] between layers; None leaves it to the compiler.
      scan: Whether all layers are one, scanned: their kernels are stacked on a leading axis, under `layers`, and
        compiling takes as long as for one. Otherwise they are `layers_0`, `layers_1` and so on.
    """

    remat: bool | Callable[..., bool] = False
    sharding: NamedSharding | None = None
    scan: bool = True

    layer: ClassVar[type[nn.Module]]

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        config, number = self.config, self.config.num_hidden_layers
        self.embeddings = self.embed(config.vocab_size)
        layer: Any = type(self).layer
        if self.remat:
            policy = None if isinstance(self.remat, bool) else self.remat
            layer = nn.remat(layer, policy=policy, prevent_cse=not self.scan)
        self.layers: Any
        if self.scan:
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": (0, nn.broadcast)}
            self.layers = self.part(nn.scan(layer, **axes, length=number), config, sharding=self.sharding)
        else:
            self.layers = [self.part(layer, config, sharding=self.sharding) for _ in range(number)]
        self.last_norm = self.norm()
        if not config.tie_word_embeddings:
            self.head = self.dense(config.vocab_size, bias=False)

    @nn.nowrap
    def norm(self, name: str | None = None) -> nn.Module:
        """The norm of this kind of model."""
        raise NotImplementedError

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer gets, [B, L, D], of ids [B, L] at positions [B or 1, L]."""
        return self.embeddings(input_ids)

    def angles(self, positions: jax.Array) -> Any:
        """`Scope.angles` at positions [B or 1, L]."""
        return None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, L, V], in which each token is blind to those after it.

        Args:
          input_ids: Integers [B, L].
          attention_mask: [B, L], 1 or True at tokens, 0 or False at padding, before them or after; None: no padding.
          segment_ids: Integers [B, L], which of several documents packed into a row each token is of; tokens of others
            are not seen. None: one document a row.
          positions: Integers [B, L]; None: counted from 0 over each document's tokens, padding not counted.

        Raises:
          ValueError: The ids are not [B, L], or longer than max_position_embeddings.
        """
        return self.logits(self.hidden(input_ids, attention_mask, segment_ids, positions))

    def logits(self, x: jax.Array) -> jax.Array:
        """From what `hidden` returns, [..., D], to [..., V]."""
        logits = self.embeddings.attend(x) if self.config.tie_word_embeddings else self.head(x)
        return (
            logits
            if self.config.final_logit_softcapping is None
            else capped(logits, self.config.final_logit_softcapping)
        )

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """What the logits are made of, [B, L, D]: `model.apply(params, input_ids, method="hidden")`."""
        self._check(input_ids)
        valid = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None and valid is None and segment_ids is None:
            positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
        elif positions is None:
            positions = positions_of(jnp.ones(input_ids.shape, bool) if valid is None else valid, segment_ids)
        return self._run(input_ids, positions, Scope(valid, segment_ids), None)[0]

    def loss(
        self,
        input_ids: jax.Array,
        mask: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """The mean cross-entropy of each next token, a float32 scalar: `model.apply(params, ids, method="loss")`.

        Neither padding nor the first token of a document is predicted.

        Args:
          input_ids: Integers [B, L].
          mask: [B, L], which tokens count, or how much, as what is to be predicted; None: all.
          attention_mask: As in a call of the model, and so are `segment_ids` and `positions`.
          segment_ids: See `attention_mask`.
          positions: See `attention_mask`.
          **options: Of `lora_jax.recipes.cross_entropy`, such as `chunk`, and `recompute` where the head is adapted.
        """
        counts = jnp.ones(input_ids.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
        # The last token has none after it. Its place is kept, so that lengths that divide go on dividing.
        labels, counts = (jnp.roll(rows, -1, axis=1) for rows in (input_ids, counts))
        counts = counts.at[:, -1].set(0)
        if attention_mask is not None:
            valid = attention_mask.astype(bool)
            counts *= (valid & jnp.roll(valid, -1, axis=1)).astype(jnp.float32)
        if segment_ids is not None:
            counts *= (segment_ids == jnp.roll(segment_ids, -1, axis=1)).astype(jnp.float32)
        x = self.hidden(input_ids, attention_mask, segment_ids, positions)
        tied = self.config.tie_word_embeddings
        head = self.embeddings.embedding.T if tied else self.head.variables["params"]["kernel"]
        softcap = self.config.final_logit_softcapping
        return cross_entropy(x, head.astype(x.dtype), labels, counts, softcap=softcap, **options)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for that many tokens, of each of a batch: `model.apply(params, 2, 64, method="empty_cache")`."""
        config = self.config
        dtype = self.dtype or self.embeddings.embedding.dtype
        shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
        key, value = (jnp.zeros(shape, dtype) for _ in range(2))
        return Cache(key, value, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    def decode(
        self, input_ids: jax.Array, cache: Cache, attention_mask: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Read on: logits [B, V] of what follows the last of these ids, and the cache with them in it.

        Args:
          input_ids: Integers [B, L], in as many slots as the cache has left, or fewer.
          cache: What `empty_cache` or an earlier call returned.
          attention_mask: [B, L], 1 or True at tokens, 0 or False at padding; None: no padding.
        """
        self._check(input_ids)
        valid = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
        before = cache.valid.sum(axis=1, keepdims=True, dtype=jnp.int32)
        slots = lax.dynamic_update_slice(cache.valid, valid, (0, cache.length))
        scope = Scope(slots, None, cache.length)
        x, (key, value) = self._run(input_ids, before + positions_of(valid), scope, (cache.key, cache.value))
        return self.logits(x[:, -1]), Cache(key, value, slots, cache.length + input_ids.shape[1])

    def _check(self, input_ids: jax.Array) -> None:
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > longest:
            raise ValueError(f"input_ids is {input_ids.shape}: make it [batch, length], length at most {longest}")

    def _run(self, input_ids: jax.Array, positions: jax.Array, scope: Scope, stores: Any) -> tuple[jax.Array, Any]:
        x = self.embedded(input_ids, positions)
        if self.sharding is not None:
            x = lax.with_sharding_constraint(x, self.sharding)
        scope = scope._replace(angles=self.angles(positions))
        carry = (x, stores)
        if self.scan:
            carry, _ = self.layers(carry, jnp.arange(self.config.num_hidden_layers, dtype=jnp.int32), scope)
        else:
            for number, layer in enumerate(self.layers):
                carry, _ = layer(carry, number, scope)
        x, stores = carry
        return self.last_norm(x), stores

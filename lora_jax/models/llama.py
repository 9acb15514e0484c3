"""Llama's decoder (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783) in Flax Linen.

And its kin: Mistral (arXiv:2310.06825), Qwen 2 (arXiv:2407.10671) and Qwen 3 (arXiv:2505.09388).

Shapes in comments: B batch, L length, D hidden_size, N layers, H query heads, G heads of keys and values, K entries of a
head, F intermediate_size. There is no dropout: a decoder is a deterministic function of its parameters and inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.models.attention import Scope, attend, remember
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import SLIDING, Config
from lora_jax.models.part import ACTIVATIONS, Norm, Part
from lora_jax.models.rotary import frequencies, rotate

__all__ = ["IGNORED", "NAMES", "RENAMES", "Config", "Llama", "partition_rules"]


def partition_rules(config: Config, scan: bool = True) -> dict[str, PartitionSpec]:
    """How each parameter lies on a mesh of the axes "fsdp" and "tp", by path: heads and hidden units over "tp".

    What a layer sums over "tp" it makes of a row of "fsdp": two sums of hidden states a layer, as Megatron-LM has it.
    """
    stack = (None,) * scan
    biased = ["query", "key", "value"] * config.attention_bias + ["gate", "up"] * config.mlp_bias
    return {
        r".*/layers[^/]*/.*/(query|key|value|gate|up)/kernel": PartitionSpec(*stack, "fsdp", "tp"),
        r".*/layers[^/]*/.*/(output|down)/kernel": PartitionSpec(*stack, "tp", "fsdp"),
        **({f".*/({'|'.join(biased)})/bias": PartitionSpec(*stack, "tp")} if biased else {}),
        ".*/embeddings/embedding": PartitionSpec("tp", "fsdp"),
        **({} if config.tie_word_embeddings else {".*/head/kernel": PartitionSpec("fsdp", "tp")}),
        ".*": PartitionSpec(),
    }


class _Part(Part):
    config: Config

    def norm(self, name: str | None = None) -> Norm:
        """RMSNorm."""
        return self.part(Norm, self.config.rms_norm_eps, name=name)


class Attention(_Part):
    """Causal attention; H / G query heads share a head of keys and values."""

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        config = self.config
        assert config.head_dim and config.num_key_value_heads and config.output_bias is not None
        query, key = (number * config.head_dim for number in (config.num_attention_heads, config.num_key_value_heads))
        self.query = self.dense(query, bias=config.attention_bias)
        self.key, self.value = (self.dense(key, bias=config.attention_bias) for _ in range(2))
        self.output = self.dense(config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.query_norm, self.key_norm = self.norm(), self.norm()

    def __call__(self, x: jax.Array, stores: Any, number: Any, scope: Scope) -> tuple[jax.Array, Any]:
        """From [B, L, D] to [B, L, D], and what the cache holds then."""
        config = self.config
        query, key, value = (
            part(x).reshape(*x.shape[:2], -1, config.head_dim) for part in (self.query, self.key, self.value)
        )
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (rotate(heads, scope.angles) for heads in (query, key))
        if stores is not None:
            stores, (key, value) = remember(stores, number, scope.start, (key, value))
        mixed = attend(query, key, value, scope, window=self._window(number))
        return self.output(mixed.reshape(*x.shape[:2], -1)), stores

    def _window(self, number: Any) -> Any:
        window, slides = self.config.sliding_window, [kind == SLIDING for kind in self.config.layer_types or ()]
        if window is None or not any(slides):
            return None
        return window if all(slides) else jnp.where(jnp.array(slides)[number], window, jnp.iinfo(jnp.int32).max)


class Mlp(_Part):
    """A gated mlp: (activation(x·gate) ∘ x·up)·down."""

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        config = self.config
        self.gate, self.up = (self.dense(config.intermediate_size, bias=config.mlp_bias) for _ in range(2))
        self.down = self.dense(config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From [B, L, D] through [B, L, F] to [B, L, D]."""
        return self.down(ACTIVATIONS[self.config.hidden_act](self.gate(x)) * self.up(x))


class Layer(_Part):
    """Attention, then the mlp; the input of each is normalized, and the result added to what it was."""

    sharding: NamedSharding | None = None

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        self.attention, self.mlp = self.part(Attention, self.config), self.part(Mlp, self.config)
        self.attention_norm, self.mlp_norm = self.norm(), self.norm()

    def __call__(self, carry: Any, number: Any, scope: Scope) -> tuple[Any, None]:
        """See `lora_jax.models.decoder.Decoder`."""
        x, stores = carry
        y, stores = self.attention(self.attention_norm(x), stores, number, scope)
        x = x + y
        x = x + self.mlp(self.mlp_norm(x))
        return (x if self.sharding is None else lax.with_sharding_constraint(x, self.sharding), stores), None


class Llama(_Part, Decoder):
    """The decoder: token ids to logits, or to the loss of the next tokens; see `lora_jax.models.decoder.Decoder`.

    >>> config = Config(100, 16, 2, num_attention_heads=4, intermediate_size=32, num_key_value_heads=2)
    >>> model, ids = Llama(config), jnp.array([[1, 5, 9], [1, 7, 2]])
    >>> params = model.init(jax.random.key(0), ids)
    >>> params["params"]["layers"]["attention"]["key"]["kernel"].shape
    (2, 16, 8)
    >>> model.apply(params, ids).shape, model.apply(params, ids, method="loss").shape
    ((2, 3, 100), ())
    """

    layer = Layer

    def angles(self, positions: jax.Array) -> Any:
        """How far each pair of a head's entries turns."""
        config = self.config
        turns = frequencies(config.head_dim or 0, config.rope_theta, config.rope_scaling)
        return positions[..., None].astype(jnp.float32) * turns


_LAYER = r".*/layers(?:_(?P<layer>\d+))?"
# Our modules, Hugging Face's names for them, and how their axes lie (see `lora_jax.formats.names`).
NAMES = (
    (r".*/embeddings", "model.embed_tokens", "embedding"),
    (_LAYER + "/attention_norm", "model.layers.{layer}.input_layernorm", "vector"),
    (_LAYER + "/attention/query", "model.layers.{layer}.self_attn.q_proj", "linear"),
    (_LAYER + "/attention/key", "model.layers.{layer}.self_attn.k_proj", "linear"),
    (_LAYER + "/attention/value", "model.layers.{layer}.self_attn.v_proj", "linear"),
    (_LAYER + "/attention/output", "model.layers.{layer}.self_attn.o_proj", "linear"),
    (_LAYER + "/attention/query_norm", "model.layers.{layer}.self_attn.q_norm", "vector"),
    (_LAYER + "/attention/key_norm", "model.layers.{layer}.self_attn.k_norm", "vector"),
    (_LAYER + "/mlp_norm", "model.layers.{layer}.post_attention_layernorm", "vector"),
    (_LAYER + "/mlp/(gate|up|down)", r"model.layers.{layer}.mlp.\2_proj", "linear"),
    (r".*/last_norm", "model.norm", "vector"),
    (r".*/head", "lm_head", "linear"),
)
RENAMES = ((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),)  # files of a model without its head
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)  # made from the config

"""Llama's decoder (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783) in Flax Linen.

And its kin: Mistral (arXiv:2310.06825), Qwen 2 (arXiv:2407.10671) and 3 (arXiv:2505.09388), Gemma 2 (arXiv:2408.00118)
and 3 (arXiv:2503.19786), of whose models for images and text it is the part for text.

Shapes in comments: B batch, L length, D hidden_size, N layers, H query heads, G heads of keys and values, K entries of
a head, F intermediate_size. There is no dropout: a decoder is a deterministic function of its parameters and inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.models.attention import Scope, attend, remember
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import SLIDING, Config
from lora_jax.models.loading import Lists, read
from lora_jax.models.part import ACTIVATIONS, Norm, Part
from lora_jax.models.rotary import frequencies, rotate

__all__ = ["IGNORED", "NAMES", "RENAMES", "Config", "Llama", "load", "partition_rules"]

ALL = 2**31 - 1  # the window of a layer that sees all tokens, where others do not


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
        return self.part(Norm, self.config.rms_norm_eps, offset=float(self.config.unit_offset), name=name)


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
        slides, angles = self._slides(number), scope.angles
        if config.rope_local_base_freq is not None:
            angles = jnp.where(slides, *angles[::-1])
        query, key = (rotate(heads, angles) for heads in (query, key))
        if stores is not None:
            stores, (key, value) = remember(stores, number, scope.start, (key, value))
        window = config.sliding_window
        if slides is not True:
            window = None if window is None or slides is False else jnp.where(slides, window, ALL)
        scale = None if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar**-0.5
        mixed = attend(query, key, value, scope, window=window, scale=scale, softcap=config.attn_logit_softcapping)
        return self.output(mixed.reshape(*x.shape[:2], -1)), stores

    def _slides(self, number: Any) -> Any:
        """Whether a layer slides; where some do and some do not, an array, since `number` is one."""
        slides = [kind == SLIDING for kind in self.config.layer_types or ()]
        return slides[0] if len({*slides}) == 1 else jnp.array(slides)[number]


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
        self.attention_norm = self.norm()
        if self.config.post_norms:
            self.attention_post_norm, self.mlp_pre_norm, self.mlp_post_norm = (self.norm() for _ in range(3))
        else:
            self.mlp_norm = self.norm()

    def __call__(self, carry: Any, number: Any, scope: Scope) -> tuple[Any, None]:
        """See `lora_jax.models.decoder.Decoder`."""
        x, stores = carry
        y, stores = self.attention(self.attention_norm(x), stores, number, scope)
        if self.config.post_norms:
            x = x + self.attention_post_norm(y)
            x = x + self.mlp_post_norm(self.mlp(self.mlp_pre_norm(x)))
        else:
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

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The tokens' rows of the table."""
        x, config = self.embeddings(input_ids), self.config
        return x * jnp.asarray(config.hidden_size**0.5, x.dtype) if config.scale_embeddings else x

    def angles(self, positions: jax.Array) -> Any:
        """How far each pair of a head's entries turns; where layers that slide have their own angles, both."""
        config = self.config
        turns = [frequencies(config.head_dim or 0, config.rope_theta, config.rope_scaling)]
        if config.rope_local_base_freq is not None:
            turns.append(frequencies(config.head_dim or 0, config.rope_local_base_freq))
        angles = [positions[..., None].astype(jnp.float32) * turn for turn in turns]
        return angles[0] if len(angles) == 1 else tuple(angles)


def load(directory: str | Path, *, scan: bool = True, **options: Any) -> tuple[Llama, Any]:
    """Load a decoder from a Hugging Face directory, with the options of `lora_jax.models.load`; `scan` as in `Decoder`.

    >>> import tempfile
    >>> from lora_jax import models
    >>> config, directory = Config(100, 8, 1, 2, 16), tempfile.mkdtemp()
    >>> params = Llama(config).init(jax.random.key(0), jnp.array([[1]]))
    >>> _ = models.save(directory, Llama(config), params)
    >>> bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, load(directory)[1])))
    True
    """
    lists = Lists(NAMES, RENAMES, IGNORED)
    return read(directory, lists, lambda file: Llama(Config.from_huggingface(file.config), scan=scan), **options)


_LAYER = r".*/layers(?:_(?P<layer>\d+))?"
# Our modules, Hugging Face's names for them, and how their axes lie (see `lora_jax.formats.names`).
NAMES = (
    (r".*/embeddings", "model.embed_tokens=lm_head", "embedding"),
    (_LAYER + "/attention_norm", "model.layers.{layer}.input_layernorm", "vector"),
    (_LAYER + "/attention/query", "model.layers.{layer}.self_attn.q_proj", "linear"),
    (_LAYER + "/attention/key", "model.layers.{layer}.self_attn.k_proj", "linear"),
    (_LAYER + "/attention/value", "model.layers.{layer}.self_attn.v_proj", "linear"),
    (_LAYER + "/attention/output", "model.layers.{layer}.self_attn.o_proj", "linear"),
    (_LAYER + "/attention/query_norm", "model.layers.{layer}.self_attn.q_norm", "vector"),
    (_LAYER + "/attention/key_norm", "model.layers.{layer}.self_attn.k_norm", "vector"),
    (_LAYER + "/mlp_norm", "model.layers.{layer}.post_attention_layernorm", "vector"),
    # Gemma's norms: after attention, before the mlp, after it.
    (_LAYER + "/attention_post_norm", "model.layers.{layer}.post_attention_layernorm", "vector"),
    (_LAYER + "/mlp_pre_norm", "model.layers.{layer}.pre_feedforward_layernorm", "vector"),
    (_LAYER + "/mlp_post_norm", "model.layers.{layer}.post_feedforward_layernorm", "vector"),
    (_LAYER + "/mlp/(gate|up|down)", r"model.layers.{layer}.mlp.\2_proj", "linear"),
    (r".*/last_norm", "model.norm", "vector"),
    (r".*/head", "lm_head", "linear"),
)
RENAMES = ((r"((?:embed_tokens|layers|norm)\..*)", r"model.\1"),)  # files of a model without its head
IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)  # made from the config

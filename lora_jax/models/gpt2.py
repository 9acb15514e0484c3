"""GPT-2's decoder (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") in Flax Linen.

Shapes in comments: B batch, L length, D hidden_size, H heads, K entries of a head, F intermediate_size. There is no
dropout: a decoder is a deterministic function of its parameters and inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.models.attention import Scope, attend, remember
from lora_jax.models.decoder import Decoder
from lora_jax.models.fields import check_fields, check_fixed, given
from lora_jax.models.loading import Lists, read
from lora_jax.models.part import ACTIVATIONS, Norm, Part

# Fields of config.json that must have this value, which is also what a file means that leaves them out.
FIXED = {"model_type": "gpt2", "add_cross_attention": False, "quantization_config": None}
# What it calls our fields.
WORDS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes and settings, in the words of Hugging Face's config.json where models have words in common.

    Attributes:
      vocab_size: V; the other sizes are D, N, H of `lora_jax.models.gpt2`.
      intermediate_size: F; None for 4 D.
      scale_attn_weights: Whether scores are divided by √K.
      scale_attn_by_inverse_layer_idx: Whether those of layer i, counted from 0, are divided by i + 1 besides.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 4 * self.hidden_size)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: use a model with one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}: take a multiple of num_attention_heads, {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def final_logit_softcapping(self) -> None:
        """Logits are as they are."""

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads."""
        return self.num_attention_heads

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Config:
        """Read the content of a config.json.

        Raises:
          ValueError: A size is missing, or the file asks for what this decoder does not do.

        >>> Config.from_huggingface({"vocab_size": 8, "n_embd": 6, "n_layer": 2, "n_head": 3}).head_dim
        2
        """
        check_fixed(config, FIXED, "decoder")
        return cls(**given(cls, {WORDS.get(name, name): value for name, value in config.items()}))


class _Part(Part):
    config: Config

    def norm(self, name: str | None = None) -> Norm:
        """LayerNorm."""
        return self.part(Norm, self.config.layer_norm_epsilon, centered=True, name=name)


class Attention(_Part):
    """Causal attention; queries, keys and values are one product."""

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        width = self.config.hidden_size
        self.qkv, self.output = self.dense(3 * width), self.dense(width)

    def __call__(self, x: jax.Array, stores: Any, number: Any, scope: Scope) -> tuple[jax.Array, Any]:
        """From [B, L, D] to [B, L, D], and what the cache holds then."""
        config = self.config
        heads = (*x.shape[:2], config.num_attention_heads, config.head_dim)
        query, key, value = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
        if config.scale_attn_by_inverse_layer_idx:
            query = query / (jnp.asarray(number) + 1).astype(query.dtype)
        if stores is not None:
            stores, (key, value) = remember(stores, number, scope.start, (key, value))
        mixed = attend(query, key, value, scope, scale=None if config.scale_attn_weights else 1.0)
        return self.output(mixed.reshape(x.shape)), stores


class Mlp(_Part):
    """Two linear maps with the activation between them."""

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        self.up, self.down = self.dense(self.config.intermediate_size or 0), self.dense(self.config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From [B, L, D] through [B, L, F] to [B, L, D]."""
        return self.down(ACTIVATIONS[self.config.hidden_act](self.up(x)))


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


class GPT2(_Part, Decoder):
    """The decoder: token ids to logits, or to the loss of the next tokens; see `lora_jax.models.decoder.Decoder`.

    >>> model, ids = GPT2(Config(100, 16, 2, num_attention_heads=4)), jnp.array([[1, 5, 9], [1, 7, 2]])
    >>> params = model.init(jax.random.key(0), ids)
    >>> params["params"]["layers"]["attention"]["qkv"]["kernel"].shape
    (2, 16, 48)
    >>> model.apply(params, ids).shape, model.apply(params, ids, method="loss").shape
    ((2, 3, 100), ())
    """

    layer = Layer

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        super().setup()
        self.position_embeddings = self.embed(self.config.max_position_embeddings)

    def embedded(self, input_ids: jax.Array, positions: jax.Array) -> jax.Array:
        """The sum of token and position."""
        return self.embeddings(input_ids) + self.position_embeddings(positions)


def load(directory: str | Path, *, scan: bool = True, **options: Any) -> tuple[GPT2, Any]:
    """Load a decoder from a Hugging Face directory, with the options of `lora_jax.models.load`; `scan` as in `Decoder`.

    >>> import tempfile
    >>> from lora_jax.formats import huggingface
    >>> config, directory = Config(100, 8, 1, 2), tempfile.mkdtemp()
    >>> params = GPT2(config).init(jax.random.key(0), jnp.array([[1]]))
    >>> _ = huggingface.save(
    ...     directory, params, NAMES, config={"vocab_size": 100, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ... )
    >>> bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, load(directory)[1])))
    True
    """
    lists = Lists(NAMES, RENAMES, IGNORED)
    return read(directory, lists, lambda file: GPT2(Config.from_huggingface(file.config), scan=scan), **options)


_LAYER = r".*/layers(?:_(?P<layer>\d+))?"
# Our modules, Hugging Face's names for them, and how their axes lie (see `lora_jax.formats.names`).
NAMES = (
    (r".*/embeddings", "transformer.wte=lm_head", "embedding"),
    (r".*/position_embeddings", "transformer.wpe", "embedding"),
    (_LAYER + "/attention_norm", "transformer.h.{layer}.ln_1", "vector"),
    (_LAYER + "/attention/qkv", "transformer.h.{layer}.attn.c_attn", "conv1d"),
    (_LAYER + "/attention/output", "transformer.h.{layer}.attn.c_proj", "conv1d"),
    (_LAYER + "/mlp_norm", "transformer.h.{layer}.ln_2", "vector"),
    (_LAYER + "/mlp/up", "transformer.h.{layer}.mlp.c_fc", "conv1d"),
    (_LAYER + "/mlp/down", "transformer.h.{layer}.mlp.c_proj", "conv1d"),
    (r".*/last_norm", "transformer.ln_f", "vector"),
    (r".*/head", "lm_head", "linear"),
)
RENAMES = ((r"((?:wte|wpe|h|ln_f)\..*)", r"transformer.\1"),)  # the first checkpoints, and models without their head
IGNORED = (r"transformer\.h\.\d+\.attn\.(masked_)?bias",)  # the causal mask

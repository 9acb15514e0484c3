"""Llama's decoder (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783) in Flax Linen.

Shapes in comments: B batch, L length, D hidden_size, H query heads, G heads of keys and values, K entries of a head.
All layers are one layer, scanned: their kernels are stacked on a leading axis, and compiling takes as long as for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from lora_jax.models.fields import check_fields
from lora_jax.models.rotary import RopeScaling, frequencies, rotate
from lora_jax.recipes import cross_entropy

# Fields of config.json that must have this value, which is also what a file means that leaves them out.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes, in the words of Hugging Face's config.json; head_dim None is hidden_size over the heads."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size is {self.hidden_size}: take a multiple of num_attention_heads, {heads}")
        defaults = {"num_key_value_heads": heads, "head_dim": self.hidden_size // heads}
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        groups, width = self.num_key_value_heads, self.head_dim
        if not groups or heads % groups:
            raise ValueError(f"num_attention_heads is {heads}: take a multiple of num_key_value_heads, {groups}")
        if not width or width % 2:
            raise ValueError(f"head_dim is {width}: rotary positions turn pairs of entries, so make it even")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Config:
        """Read the content of a config.json.

        Raises:
          ValueError: A size is missing, or the file asks for what this decoder does not do.

        >>> Config.from_huggingface({"model_type": "gpt2"})
        Traceback (most recent call last):
        ValueError: config.json: model_type is 'gpt2', this decoder has 'llama': load a model with that
        """
        for field in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(field) or {}, Mapping):
                raise ValueError(f"config.json: {field} is {config[field]!r}: make it an object, or leave it out")
        rope = config.get("rope_parameters") or {}  # where transformers 5 keeps what 4 has in two fields
        config = {**rope, **config, "rope_scaling": config.get("rope_scaling") or rope or None}
        for field, value in FIXED.items():
            got = config.get(field, value)
            if got != value:
                raise ValueError(f"config.json: {field} is {got!r}, this decoder has {value!r}: load a model with that")
        names = [field.name for field in dataclasses.fields(cls)]
        if absent := [name for name in names[:5] if name not in config]:
            raise ValueError(f"config.json lacks {', '.join(absent)}: take the one that belongs to the weights")
        given = {name: config[name] for name in names if config.get(name) is not None}
        return cls(**{**given, "rope_scaling": RopeScaling.from_huggingface(config["rope_scaling"])})


def partition_rules(config: Config) -> dict[str, PartitionSpec]:
    """How each parameter lies on a mesh of the axes "fsdp" and "tp", by path: heads and hidden units over "tp".

    What a layer sums over "tp" it makes of a row of "fsdp": two sums of hidden states a layer, as Megatron-LM has it.
    """
    biased = ["query", "key", "value"] * config.attention_bias + ["gate", "up"] * config.mlp_bias
    return {
        ".*/layers/.*/(query|key|value|gate|up)/kernel": PartitionSpec(None, "fsdp", "tp"),
        ".*/layers/.*/(output|down)/kernel": PartitionSpec(None, "tp", "fsdp"),
        **({f".*/({'|'.join(biased)})/bias": PartitionSpec(None, "tp")} if biased else {}),
        ".*/embeddings/embedding": PartitionSpec("tp", "fsdp"),
        **({} if config.tie_word_embeddings else {".*/head/kernel": PartitionSpec("fsdp", "tp")}),
        ".*": PartitionSpec(),
    }


class _Part(nn.Module):
    """What the modules share: the config, and the dtypes of computation (None: the parameters') and parameters."""

    config: Config
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.nowrap
    def dense(self, features: int, bias: bool, name: str) -> nn.Dense:
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(features, bias, self.dtype, self.param_dtype, kernel_init=init, name=name)

    @nn.nowrap
    def norm(self, name: str) -> nn.RMSNorm:
        return nn.RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name=name)


class Attention(_Part):
    """Causal attention; H / G query heads share a head of keys and values."""

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """From [B, L, D] to [B, L, D]."""
        config = self.config
        width, groups = config.head_dim, config.num_key_value_heads
        assert width and groups

        def heads(name: str, number: int) -> jax.Array:
            y = self.dense(number * width, config.attention_bias, name)(x)
            return y.reshape(*x.shape[:2], number, -1)

        query = rotate(heads("query", config.num_attention_heads), angles)
        key = rotate(heads("key", groups), angles)
        value = heads("value", groups)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.dense(config.hidden_size, config.attention_bias, "output")(mixed.reshape(*x.shape[:2], -1))


class Mlp(_Part):
    """A gated mlp: (silu(x·gate) ∘ x·up)·down."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From [B, L, D] to [B, L, D]."""
        width, bias = self.config.intermediate_size, self.config.mlp_bias
        gate, up = (self.dense(width, bias, name)(x) for name in ("gate", "up"))
        return self.dense(self.config.hidden_size, bias, "down")(nn.silu(gate) * up)


class Layer(_Part):
    """Attention, then the mlp; the input of each is normalized, and the result added to what it was."""

    sharding: NamedSharding | None = None

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, None]:
        """From [B, L, D] to [B, L, D], and None, as `nn.scan` has it."""
        given = self.config, self.dtype, self.param_dtype
        x = x + Attention(*given, name="attention")(self.norm("attention_norm")(x), angles)
        x = x + Mlp(*given, name="mlp")(self.norm("mlp_norm")(x))
        return x if self.sharding is None else lax.with_sharding_constraint(x, self.sharding), None


class Llama(_Part):
    """The decoder: token ids to logits, or to the loss of the next tokens.

    Attributes:
      remat: Whether the backward pass makes each layer anew (True), all but what a policy of `jax.checkpoint` keeps
        (such as `lora_jax.recipes.save_products`), or nothing (False).
      sharding: Of hidden states [B, L, D] between layers; None leaves it to the compiler.

    >>> config = Config(100, 16, 2, num_attention_heads=4, intermediate_size=32, num_key_value_heads=2)
    >>> model, ids = Llama(config), jnp.array([[1, 5, 9], [1, 7, 2]])
    >>> params = model.init(jax.random.key(0), ids)
    >>> params["params"]["layers"]["attention"]["key"]["kernel"].shape
    (2, 16, 8)
    >>> model.apply(params, ids).shape, model.apply(params, ids, method="loss").shape
    ((2, 3, 100), ())
    """

    remat: bool | Callable[..., bool] = False
    sharding: NamedSharding | None = None

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.embeddings = nn.Embed(config.vocab_size, config.hidden_size, self.dtype, self.param_dtype, init)
        policy = None if isinstance(self.remat, bool) else self.remat
        layer = nn.remat(Layer, policy=policy, prevent_cse=False) if self.remat else Layer
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": nn.broadcast}
        scanned = nn.scan(layer, **axes, length=config.num_hidden_layers)
        self.layers = scanned(config, self.dtype, self.param_dtype, self.sharding)
        self.last_norm = self.norm("last_norm")
        if not config.tie_word_embeddings:
            self.head = self.dense(config.vocab_size, False, "head")

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """From integers [B, L] to logits [B, L, vocab_size], in which each token is blind to those after it.

        Raises:
          ValueError: The ids are not [B, L], or longer than max_position_embeddings.
        """
        x = self.hidden(input_ids)
        return self.embeddings.attend(x) if self.config.tie_word_embeddings else self.head(x)

    def hidden(self, input_ids: jax.Array) -> jax.Array:
        """What the logits are made of, [B, L, D]: `model.apply(params, input_ids, method="hidden")`."""
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > longest:
            raise ValueError(f"input_ids is {input_ids.shape}: make it [batch, length], length at most {longest}")
        x = self.embeddings(input_ids)
        if self.sharding is not None:
            x = lax.with_sharding_constraint(x, self.sharding)
        config = self.config
        turns = frequencies(config.head_dim or 0, config.rope_theta, config.rope_scaling)
        angles = jnp.arange(input_ids.shape[1], dtype=jnp.float32)[:, None] * turns
        x, _ = self.layers(x, angles)
        return self.last_norm(x)

    def loss(self, input_ids: jax.Array, mask: jax.Array | None = None, **options: Any) -> jax.Array:
        """The mean cross-entropy of each next token, a float32 scalar: `model.apply(params, ids, method="loss")`.

        Args:
          input_ids: Integers [B, L].
          mask: [B, L], which tokens count, or how much, as what is to be predicted; None: all.
          **options: Of `lora_jax.recipes.cross_entropy`, such as `chunk`, and `recompute` where the head is adapted.
        """
        counts = jnp.ones(input_ids.shape) if mask is None else mask
        # The last token has none after it. Its place is kept, so that lengths that divide go on dividing.
        labels, counts = (jnp.roll(rows, -1, axis=1) for rows in (input_ids, counts))
        counts = counts.astype(jnp.float32).at[:, -1].set(0)
        tied = self.config.tie_word_embeddings
        head = self.embeddings.embedding.T if tied else self.head.variables["params"]["kernel"]
        return cross_entropy(self.hidden(input_ids), head, labels, counts, **options)

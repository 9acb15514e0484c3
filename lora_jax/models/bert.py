"""BERT's encoder (Devlin et al. 2018, arXiv:1810.04805) in Flax Linen, with Hugging Face's weights.

Shapes in comments: B batch, L length, D hidden_size, H heads, F intermediate_size. There is no dropout: the encoder
is a deterministic function of its parameters and inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.formats import huggingface
from lora_jax.models.fields import check_fields, check_fixed, given
from lora_jax.models.loading import Lists, read
from lora_jax.models.part import ACTIVATIONS, Norm, Part

# Fields of config.json that must have this value, which is also what a file means that leaves them out.
FIXED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """An encoder's sizes, in the words of Hugging Face's config.json; `pooler` is whether the weights have one."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pooler: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: use a model with one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}: take a multiple of num_attention_heads, {self.num_attention_heads}"
            )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any], pooler: bool = True) -> Config:
        """Read the content of a config.json.

        Raises:
          ValueError: A size is missing, or the file asks for what this encoder does not do.

        >>> Config.from_huggingface({"model_type": "gpt2"})
        Traceback (most recent call last):
        ValueError: config.json: model_type is 'gpt2', this encoder has 'bert': load a model with that
        """
        check_fixed(config, FIXED, "encoder")
        return cls(**{**given(cls, config), "pooler": pooler})


class _Part(Part):
    config: Config

    def norm(self, name: str) -> Norm:
        """LayerNorm."""
        return self.part(Norm, self.config.layer_norm_eps, centered=True, name=name)


class Embeddings(_Part):
    """The sum of word, position and token type, normalized."""

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """From two integer arrays [B, L] to [B, L, D]."""
        positions = jnp.arange(input_ids.shape[1])[None]
        x = self.embed(self.config.vocab_size, "word")(input_ids)
        x += self.embed(self.config.type_vocab_size, "token_type")(token_type_ids)
        x += self.embed(self.config.max_position_embeddings, "position")(positions)
        return self.norm("norm")(x)


class Attention(_Part):
    """Attention in both directions, with several heads."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """From [B, L, D] to [B, L, D]; the boolean mask [B, 1, 1, L] is True at the tokens that may be looked at."""
        width = self.config.hidden_size
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)  # [B, L, H, D / H]
        query, key, value = (self.dense(width, name)(x).reshape(heads) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)
        return self.dense(width, "output")(mixed.reshape(x.shape))


class Mlp(_Part):
    """Two linear maps with the activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From [B, L, D] through [B, L, F] to [B, L, D]."""
        hidden = self.dense(self.config.intermediate_size, "up")(x)
        return self.dense(self.config.hidden_size, "down")(ACTIVATIONS[self.config.hidden_act](hidden))


class Layer(_Part):
    """Attention, then the mlp; each is added to its input and normalized after."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """From [B, L, D] to [B, L, D]; the mask is as in `Attention`."""
        x = self.norm("attention_norm")(x + self.part(Attention, self.config, name="attention")(x, mask))
        return self.norm("mlp_norm")(x + self.part(Mlp, self.config, name="mlp")(x))


class Bert(_Part):
    """The encoder: token ids to hidden states.

    >>> model = Bert(Config(100, 8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    >>> ids = jnp.array([[1, 5, 9], [1, 7, 0]])
    >>> params = model.init(jax.random.key(0), ids)
    >>> params["params"]["layers_0"]["mlp"]["up"]["kernel"].shape
    (8, 16)
    >>> model.apply(params, ids, ids != 0).shape
    (2, 3, 8)
    """

    def setup(self) -> None:
        """Name the parts, and with them the parameters."""
        self.embeddings = self.part(Embeddings, self.config, name="embeddings")
        self.layers = [self.part(Layer, self.config, name=f"layers_{i}") for i in range(self.config.num_hidden_layers)]
        if self.config.pooler:
            self.pooler = self.dense(self.config.hidden_size, "pooler")

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        all_layers: bool = False,
    ) -> jax.Array:
        """Encode a batch of token sequences.

        Args:
          input_ids: Integers [B, L].
          attention_mask: [B, L], 1 or True at tokens, 0 or False at padding; None: no padding.
          token_type_ids: Integers [B, L], the segment that each token is of; None: all of the first.
          all_layers: Whether to return every layer's hidden states, the embeddings' output first.

        Returns:
          Hidden states [B, L, D], with all_layers [num_hidden_layers + 1, B, L, D]; those at padding mean nothing.

        Raises:
          ValueError: The ids are not [B, L], or longer than the position table.
        """
        longest = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] > longest:
            raise ValueError(f"input_ids is {input_ids.shape}: make it [batch, length], length at most {longest}")
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
        states = [self.embeddings(input_ids, token_type_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        if self.is_initializing() and self.config.pooler:
            self.pool(states[-1])
        return jnp.stack(states) if all_layers else states[-1]

    def pool(self, hidden: jax.Array) -> jax.Array:
        """BERT's own summary of a sequence, [B, L, D] to [B, D]: `model.apply(params, hidden, method="pool")`."""
        return jnp.tanh(self.pooler(hidden[:, 0]))


def load(directory: str | Path, **options: Any) -> tuple[Bert, Any]:
    """Load an encoder from a Hugging Face directory, with a pooler if it has one; options as in `lora_jax.models.load`.

    >>> import tempfile
    >>> config, directory = Config(100, 8, 1, 2, 16), tempfile.mkdtemp()
    >>> params = Bert(config).init(jax.random.key(0), jnp.array([[1]]))
    >>> _ = huggingface.save(directory, params, NAMES, config=dataclasses.asdict(config))
    >>> bool(jax.tree.all(jax.tree.map(jnp.array_equal, params, load(directory)[1])))
    True
    """

    def model(checkpoint: huggingface.Checkpoint) -> Bert:
        pooler = any(name.startswith("pooler.") for name in checkpoint.tensors)
        return Bert(Config.from_huggingface(checkpoint.config, pooler))

    return read(directory, Lists(NAMES, RENAMES, IGNORED), model, **options)


# Our modules, Hugging Face's names for them, and how their axes lie (see `lora_jax.formats.names`).
NAMES = (
    (r".*/embeddings/(word|position|token_type)", r"embeddings.\1_embeddings", "embedding"),
    (r".*/embeddings/norm", r"embeddings.LayerNorm", "vector"),
    (r".*/layers_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2", "linear"),
    (r".*/layers_(\d+)/attention/output", r"encoder.layer.\1.attention.output.dense", "linear"),
    (r".*/layers_(\d+)/attention_norm", r"encoder.layer.\1.attention.output.LayerNorm", "vector"),
    (r".*/layers_(\d+)/mlp/up", r"encoder.layer.\1.intermediate.dense", "linear"),
    (r".*/layers_(\d+)/mlp/down", r"encoder.layer.\1.output.dense", "linear"),
    (r".*/layers_(\d+)/mlp_norm", r"encoder.layer.\1.output.LayerNorm", "vector"),
    (r".*/pooler", r"pooler.dense", "linear"),
)
RENAMES = (
    (r"bert\.(.*)", r"\1"),  # models with a task's head keep the encoder under this prefix
    (r"(.*LayerNorm)\.gamma", r"\1.weight"),  # TensorFlow's names, in the first checkpoints
    (r"(.*LayerNorm)\.beta", r"\1.bias"),
)
IGNORED = (r"embeddings\.position_ids",)  # the constant 0, 1, 2 ...

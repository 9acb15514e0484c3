"""Llama's config, and the families of models that are Llamas of other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models.fields import check_fields, check_fixed, given
from lora_jax.models.part import ACTIVATIONS
from lora_jax.models.rotary import RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"

# Fields of config.json that must have this value, which is also what a file means that leaves them out. Among them are
# fields that a family does not have and ours has, lest a file seem to be obeyed that is not.
FIXED = {
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "qk_norm": False,
    "output_bias": None,
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# For each model_type: what a file means that leaves a field out, where it differs from `Config`; and more of FIXED.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"sliding_window": None}),
    "mistral": (
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": (_QWEN, {"attention_bias": True, "output_bias": False, "mlp_bias": False}),
    "qwen3": ({**_QWEN, "head_dim": 128}, {"qk_norm": True, "mlp_bias": False}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder's sizes and settings, in the words of Hugging Face's config.json.

    Attributes:
      vocab_size: V; the other sizes are D, N, H, F of `lora_jax.models.llama`.
      num_key_value_heads: G; None for H.
      head_dim: K; None for D / H.
      attention_bias: Whether queries, keys and values have biases.
      output_bias: Whether what attention gives has one; None for as they do.
      qk_norm: Whether each head's queries and keys are normalized.
      sliding_window: How many tokens a layer that slides sees, itself included; None where none slides.
      layer_types: "sliding_attention" or "full_attention", for each layer; None for the first in all, if any slides.
    """

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
    hidden_act: str = "silu"
    output_bias: bool | None = None
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size is {self.hidden_size}: take a multiple of num_attention_heads, {heads}")
        defaults = {
            "num_key_value_heads": heads,
            "head_dim": self.hidden_size // heads,
            "output_bias": self.attention_bias,
            "layer_types": (SLIDING if self.sliding_window else FULL,) * self.num_hidden_layers,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        groups, width = self.num_key_value_heads, self.head_dim
        if not groups or heads % groups:
            raise ValueError(f"num_attention_heads is {heads}: take a multiple of num_key_value_heads, {groups}")
        if not width or width % 2:
            raise ValueError(f"head_dim is {width}: rotary positions turn pairs of entries, so make it even")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}: use a model with one of {', '.join(ACTIVATIONS)}")
        types = self.layer_types or ()
        if len(types) != self.num_hidden_layers or not {*types} <= {FULL, SLIDING}:
            raise ValueError(f"layer_types is {types}: make it {FULL!r} or {SLIDING!r}, once for each layer")
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r}, and sliding_window is None: give the number of tokens")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Config:
        """Read the content of a config.json.

        Raises:
          ValueError: A size is missing, or the file asks for what this decoder does not do.

        >>> Config.from_huggingface({"model_type": "gpt2"})
        Traceback (most recent call last):
        ValueError: config.json: model_type is 'gpt2', this decoder has llama, mistral, qwen2, qwen3: load one of them
        """
        for field in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(field) or {}, Mapping):
                raise ValueError(f"config.json: {field} is {config[field]!r}: make it an object, or leave it out")
        family = config.get("model_type", "llama")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"config.json: model_type is {family!r}, this decoder has {known}: load one of them")
        defaults, fixed = FAMILIES[family]
        fixed = {**FIXED, **fixed}
        rope = config.get("rope_parameters") or {}  # where transformers 5 keeps what 4 has in two fields
        config = {**defaults, **rope, **config, "rope_scaling": config.get("rope_scaling") or rope or None}
        check_fixed(config, fixed, "decoder")
        config = {**config, **fixed, **_layers(config)}
        config["rope_scaling"] = RopeScaling.from_huggingface(config["rope_scaling"])
        return cls(**given(cls, config))


def _layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window, and which layers slide."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    types = config.get("layer_types")
    if "max_window_layers" in config:  # a Qwen
        if types is None and window is not None and isinstance(number := config.get("num_hidden_layers"), int):
            types = [SLIDING if i >= config["max_window_layers"] else FULL for i in range(number)]
    elif {*(types or ())} - {SLIDING if window else FULL}:  # which transformers reads in part
        raise ValueError(f"config.json: layer_types is {types}, and sliding_window {window}: leave layer_types out")
    return {"sliding_window": window, "layer_types": None if types is None else tuple(types)}

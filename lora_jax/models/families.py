"""Llama's config, and the families of models that are Llamas of other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.models.fields import check_fields, check_fixed, given
from lora_jax.models.part import ACTIVATIONS
from lora_jax.models.rotary import RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"

_OURS = ("qk_norm", "post_norms", "unit_offset", "scale_embeddings")
_GEMMAS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "rope_local_base_freq")
# Fields of config.json that must have this value, which is also what a file means that leaves them out, in families
# that do not say otherwise. Among them are fields that other families have, lest a file seem to be obeyed that is not.
FIXED = {
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_bidirectional_attention": False,
    "output_bias": None,
    **dict.fromkeys(_OURS, False),
    **dict.fromkeys(_GEMMAS),
}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_OF_GEMMA = {"mlp_bias": False, "post_norms": True, "unit_offset": True, "scale_embeddings": True}
# For each model_type: what a file means that leaves a field out, where it differs from `Config`; and what is fixed.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({}, {"sliding_window": None}),
    "mistral": (
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        {"attention_bias": False, "mlp_bias": False},
    ),
    "qwen2": (_QWEN, {"attention_bias": True, "output_bias": False, "mlp_bias": False}),
    "qwen3": ({**_QWEN, "head_dim": 128}, {"qk_norm": True, "mlp_bias": False}),
    "gemma2": (
        {**_GEMMA, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {**_OF_GEMMA, "sliding_window_pattern": 2},
    ),
    "gemma3_text": (
        {
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        {**_OF_GEMMA, "qk_norm": True},
    ),
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
      rope_local_base_freq: `rope_theta` of layers that slide, whose positions are not stretched; None for the same.
      query_pre_attn_scalar: Scores are divided by its root; None for K.
      attn_logit_softcapping: Scores are bent to lie between this and its negative; None for not. So are logits by
        `final_logit_softcapping`.
      final_logit_softcapping: See `attn_logit_softcapping`.
      post_norms: Whether what attention and mlp give is normalized, too.
      unit_offset: Whether norms hold how much their scales differ from 1.
      scale_embeddings: Whether embeddings are multiplied by √D.
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
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    post_norms: bool = False
    unit_offset: bool = False
    scale_embeddings: bool = False

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
        if len(types) != self.num_hidden_layers or not all(kind in (FULL, SLIDING) for kind in types):
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
        ValueError: config.json: model_type is 'gpt2', not llama, mistral, qwen2, qwen3, gemma2, gemma3_text
        """
        family = config.get("model_type", "llama")
        if not isinstance(family, str) or family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"config.json: model_type is {family!r}, not {known}")
        defaults, own = FAMILIES[family]
        fixed = {**{name: value for name, value in FIXED.items() if name not in defaults}, **own}
        config = {**defaults, **_rope(config)}
        check_fixed(config, fixed, "decoder")
        config = {**config, **fixed, **_layers({**config, **fixed}, {**defaults, **own})}
        config["rope_scaling"] = RopeScaling.from_huggingface(config["rope_scaling"])
        config["hidden_act"] = config.get("hidden_activation" if "hidden_activation" in defaults else "hidden_act")
        return cls(**given(cls, config))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file with `rope_theta` and `rope_scaling` as transformers 4 has them; 5 has `rope_parameters` for both."""
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(field) or {}, Mapping):
            raise ValueError(f"config.json: {field} is {config[field]!r}: make it an object, or leave it out")
    rope = config.get("rope_parameters") or {}
    if isinstance(local := rope.get(SLIDING), Mapping) and isinstance(rope.get(FULL), Mapping):
        rope = {**rope[FULL], "rope_local_base_freq": local.get("rope_theta")}
        if RopeScaling.from_huggingface(local) is not None:
            raise ValueError(
                f"config.json: {SLIDING} has rope_parameters {dict(local)}: this decoder stretches no such"
            )
    return {**rope, **config, "rope_scaling": config.get("rope_scaling") or rope or None}


def _layers(config: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The window, and which layers slide, of a family that knows these fields."""
    window = config.get("sliding_window")
    if "use_sliding_window" in known and not config["use_sliding_window"]:
        window = None
    types, number = config.get("layer_types"), config.get("num_hidden_layers")
    if types is not None and not isinstance(types, list | tuple):
        raise ValueError(f"config.json: layer_types is {types!r}: make it a list")
    rule = next((name for name in ("max_window_layers", "sliding_window_pattern") if name in known), None)
    if rule is None:
        only = SLIDING if window else FULL  # transformers heeds others in part
        if types is not None and any(kind != only for kind in types):
            raise ValueError(f"config.json: layer_types is {types}, and sliding_window {window}: leave layer_types out")
    elif types is None and window is not None and isinstance(number, int):
        if not isinstance(limit := config[rule], int) or limit < 0:
            raise ValueError(f"config.json: {rule} is {limit!r}: make it a whole number")
        slides = [i >= limit if rule == "max_window_layers" else bool((i + 1) % limit) for i in range(number)]
        types = [SLIDING if yes else FULL for yes in slides]
    return {"sliding_window": window, "layer_types": None if types is None else tuple(types)}

"""Tunix's models, whose weights have heads as axes of their own; they fit `nnx.state(model)`.

Source: `tunix/models/*/model.py` of Tunix 0.1.7.

>>> import numpy as np
>>> from lora_jax.formats.names import locate
>>> place = locate({"layers/3/attn/kv_einsum/w/value": np.ones((2, 4, 24, 8))}, GEMMA2).popitem()[1]
>>> [*place.tensors.values()], place.theirs
(['model.layers.3.self_attn.k_proj.weight', 'model.layers.3.self_attn.v_proj.weight'], (32, 24))
"""

from __future__ import annotations

from lora_jax.formats.names import Names

_LAYER, _THEIRS = r"(?:.*/)?layers/(\d+)", r"model.layers.\1"
_COMMON: Names = (
    (r"(?:.*/)?embedder", "model.embed_tokens=lm_head", "embedding"),
    (r"(?:.*/)?lm_head", "lm_head", "linear"),
    (r"(?:.*/)?final_norm", "model.norm", "vector"),
    (rf"{_LAYER}/mlp/(\w+_proj)", rf"{_THEIRS}.mlp.\2", "linear"),
)
LLAMA3: Names = (
    *_COMMON,
    (rf"{_LAYER}/(\w+_layernorm)", rf"{_THEIRS}.\2", "vector"),
    (rf"{_LAYER}/attn/([qkv]_proj)", rf"{_THEIRS}.self_attn.\2", "linear: in heads width -> (heads width) in"),
    (rf"{_LAYER}/attn/o_proj", rf"{_THEIRS}.self_attn.o_proj", "linear: heads width out -> out (heads width)"),
)
QWEN2: Names = (
    *LLAMA3,
    (rf"{_LAYER}/attn/([qkv])", rf"{_THEIRS}.self_attn.\2_proj", "linear"),  # of biases alone, without axes of heads
)
QWEN3: Names = (
    *LLAMA3,
    (rf"{_LAYER}/attn/([qk]_norm)", rf"{_THEIRS}.self_attn.\2", "vector"),
)
QWEN3_MOE: Names = (
    *(entry for entry in QWEN3 if "mlp" not in entry[0]),
    (rf"{_LAYER}/mlp/router", rf"{_THEIRS}.mlp.gate", "linear"),
    (rf"{_LAYER}/mlp/(\w+_proj)", rf"{_THEIRS}.mlp.experts.{{expert}}.\2", "linear"),
)
_EINSUM = "linear: heads in width -> (heads width) in"
_GEMMA: Names = (
    *_COMMON,
    (rf"{_LAYER}/pre_attention_norm", rf"{_THEIRS}.input_layernorm", "vector"),
    (rf"{_LAYER}/attn/q_einsum", rf"{_THEIRS}.self_attn.q_proj", _EINSUM),
    (rf"{_LAYER}/attn/kv_einsum", rf"{_THEIRS}.self_attn.{{part:k_proj,v_proj}}", _EINSUM),
    (rf"{_LAYER}/attn/qkv_einsum", rf"{_THEIRS}.self_attn.{{part:q_proj,k_proj,v_proj}}", _EINSUM),
    (
        rf"{_LAYER}/attn/attn_vec_einsum",
        rf"{_THEIRS}.self_attn.o_proj",
        "linear: heads width out -> out (heads width)",
    ),
)
GEMMA: Names = (*_GEMMA, (rf"{_LAYER}/pre_ffw_norm", rf"{_THEIRS}.post_attention_layernorm", "vector"))
GEMMA2: Names = (
    *_GEMMA,
    (rf"{_LAYER}/post_(?:attn|attention)_norm", rf"{_THEIRS}.post_attention_layernorm", "vector"),
    (rf"{_LAYER}/(pre|post)_ffw_norm", rf"{_THEIRS}.\2_feedforward_layernorm", "vector"),
)
GEMMA3: Names = (
    *GEMMA2,
    (rf"{_LAYER}/attn/_query_norm", rf"{_THEIRS}.self_attn.q_norm", "vector"),
    (rf"{_LAYER}/attn/_key_norm", rf"{_THEIRS}.self_attn.k_norm", "vector"),
)

"""The Flax models that transformers had until version 4, whose modules are called as the PyTorch ones are.

They fit a model's `params`, as they are or in `{"params": ...}`.

Source: `modeling_flax_*.py` of transformers 4.57.

>>> import numpy as np
>>> from lora_jax.formats.names import locate
>>> place = locate({"transformer/h/0/attn/c_attn/kernel": np.ones((72, 24))}, GPT2).popitem()[1]
>>> place.tensors, place.theirs
({(): 'transformer.h.0.attn.c_attn.weight'}, (24, 72))
"""

from __future__ import annotations

from lora_jax.formats.names import Names


def _same(pattern: str, layout: str, template: str = "{path}") -> tuple[str, str, str]:
    """Modules of theirs that have the path of ours, with dots."""
    return rf"(?:params/)?(?P<path>{pattern})", template, layout


GPT2: Names = (
    _same(r"transformer/wte", "embedding", "{path}=lm_head"),
    _same(r"wte|(?:transformer/)?wpe", "embedding"),
    _same(r"(?:transformer/)?(?:h/\d+/)?ln_\w", "vector"),
    _same(r"(?:transformer/)?h/\d+/\w+/\w+", "conv1d: out in -> in out"),  # its Conv1D is theirs transposed
    _same(r"lm_head", "linear"),
)
LLAMA: Names = (
    _same(r"model/embed_tokens", "embedding", "{path}=lm_head"),
    _same(r"embed_tokens", "embedding"),
    _same(r"(?:model/)?(?:layers/\d+/\w+_?layernorm|norm)", "vector"),
    _same(r"(?:model/)?layers/\d+/(?:self_attn|mlp)/\w+|lm_head", "linear"),
)
MISTRAL = GEMMA = LLAMA
_BERT: Names = (
    _same(r"(?:\w+/)?embeddings/(?:position|token_type)_embeddings", "embedding"),
    _same(r"(?:.*/)?LayerNorm|cls/predictions|lm_head(?:/layer_norm)?", "vector"),
    _same(r"(?:.*/)?(?:query|key|value|dense|out_proj)", "linear"),
    _same(r"classifier|qa_outputs|cls/seq_relationship", "linear"),
)
BERT: Names = (_same(r"(?:\w+/)?embeddings/word_embeddings", "embedding"), *_BERT)
# Those whose table is also the head.
BERT_MASKED_LM: Names = (
    _same(r"bert/embeddings/word_embeddings", "embedding", "{path}=cls.predictions.decoder"),
    *_BERT,
)
ROBERTA = BERT
ROBERTA_MASKED_LM: Names = (_same(r"roberta/embeddings/word_embeddings", "embedding", "{path}=lm_head.decoder"), *_BERT)
T5: Names = (
    _same(r"shared", "parameter", "{path}.weight"),  # two modules of theirs look it up, and none of this name
    _same(r"\w+/block/\d+/layer/\d+/SelfAttention/relative_attention_bias", "embedding"),
    _same(r"\w+/(?:block/\d+/layer/\d+/|final_)layer_norm", "vector"),
    _same(r"\w+/block/\d+/layer/\d+/\w+/(?:[qkvo]|w\w+)|lm_head", "linear"),
)
VIT: Names = (
    _same(r"(?:vit/)?embeddings/(?:cls_token|position_embeddings)", "parameter"),
    _same(r"(?:vit/)?embeddings/patch_embeddings/projection", "conv"),
    _same(r"(?:.*/)?layernorm\w*", "vector"),
    _same(r"(?:.*/)?(?:query|key|value|dense)|classifier", "linear"),
)
WHISPER: Names = (
    _same(r"model/decoder/embed_tokens", "embedding", "{path}=proj_out"),
    _same(r"decoder/embed_tokens", "embedding"),
    _same(
        r"(?:model/)?\w+/embed_positions", "parameter", "{path}.weight"
    ),  # theirs are no tables that PEFT could adapt
    _same(r"(?:model/)?encoder/conv\d", "conv: width in out -> out in width"),
    _same(r".*layer_norm", "vector"),
    _same(r".*/(?:\w+_proj|fc\d)|proj_out|projector|classifier", "linear"),
)
CLIP: Names = (
    _same(r"logit_scale|vision_model/embeddings/class_embedding", "parameter"),
    _same(r"vision_model/embeddings/patch_embedding", "conv"),
    _same(r"(?:text|vision)_model/embeddings/(?:token|position)_embedding", "embedding"),
    _same(r"(?:text|vision)_model/(?:encoder/layers/\d+/|\w+_|)layer_?norm\d?|vision_model/pre_layrnorm", "vector"),
    _same(r".*/(?:\w+_proj|fc\d)|(?:text|visual)_projection", "linear"),
)

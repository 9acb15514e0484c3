"""Tiny models of transformers, by class name: one config makes the Flax model and the PyTorch one."""

from __future__ import annotations

from typing import Any

_TEXT = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 20}
_ENCODER = {**_TEXT, "max_position_embeddings": 20}
_IMAGE = {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
_WHISPER = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 10,
    "max_source_positions": 16, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 5,
    "num_heads": 4,
    "d_ff": 40,
    "num_layers": 2,
    "decoder_start_token_id": 0,
}

# class: (config's class, its fields)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {"vocab_size": 50, "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 4}),
    "LlamaForCausalLM": ("LlamaConfig", {**_DECODER, "head_dim": None}),
    "MistralForCausalLM": ("MistralConfig", {**_DECODER, "sliding_window": None}),
    "GemmaForCausalLM": ("GemmaConfig", {**_DECODER, "head_dim": 8}),
    "BertForMaskedLM": ("BertConfig", _ENCODER),
    "BertForSequenceClassification": ("BertConfig", _ENCODER),
    "RobertaForMaskedLM": ("RobertaConfig", _ENCODER),
    "RobertaForSequenceClassification": ("RobertaConfig", _ENCODER),
    "T5ForConditionalGeneration": ("T5Config", _T5),
    "ViTForImageClassification": ("ViTConfig", {**_IMAGE, "num_labels": 3}),
    "WhisperForConditionalGeneration": ("WhisperConfig", _WHISPER),
    "CLIPModel": ("CLIPConfig", {"text_config": _ENCODER, "vision_config": _IMAGE, "projection_dim": 12}),
}
T5_GATED = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS_BESIDE = {"T5 gated": ("T5ForConditionalGeneration", "T5Config", T5_GATED)}


def config(name: str) -> tuple[str, Any]:
    """(the PyTorch model's class, its config) of an entry's name."""
    import transformers

    kind, cls, fields = MODELS_BESIDE.get(name, (name, *MODELS.get(name, ("", {}))))
    return kind, getattr(transformers, cls)(**fields)


NAMES = (*MODELS, *MODELS_BESIDE)

"""The models that the maps are checked against: tiny ones, with every size another, of PyTorch and of Flax or Tunix."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_TEXT = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 20}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4}
_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 5, "num_heads": 4, "d_ff": 40, "num_layers": 2, "dropout_rate": 0.0}
_WHISPER = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44, "num_mel_bins": 10,
    "max_source_positions": 16, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {**_DECODER, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}


class Case(NamedTuple):
    """A model: the map's name, PyTorch's class, its config's class and fields, and Tunix's class and fields."""

    map: str
    model: str
    config: str
    fields: dict[str, Any]
    tunix: tuple[str, str, dict[str, Any]] | None = None


def _tunix(file: str, cls: str, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    own = {"num_layers": 2, "embed_dim": 24, "hidden_dim": 40, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    own |= {"num_embed": 50, "head_dim": 8} if "gemma" in file else {"vocab_size": 50, "rope_theta": 10000}
    return file, cls, {**own, **({} if "gemma" in file else {"norm_eps": 1e-6}), **fields}


_GEMMA1 = {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False}
_GEMMA2 = {
    "final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 32, "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
}  # fmt: skip
_MOE = {"num_experts": 3, "num_experts_per_tok": 2}
_LONG = {**_DECODER, "rope_theta": 1e6}  # which Tunix's Llama 3 and Qwen 3 have, whatever their configs say
_QWEN_MOE = {**_LONG, **_MOE, "head_dim": 6, "moe_intermediate_size": 40, "norm_topk_prob": True}

CASES = {
    "FlaxGPT2": Case(
        "GPT2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 50, "n_positions": 20, "n_embd": 24, "n_layer": 2, "n_head": 4},
    ),
    "FlaxLlama": Case("LLAMA", "LlamaForCausalLM", "LlamaConfig", _DECODER),
    "FlaxMistral": Case("MISTRAL", "MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 32}),
    "FlaxGemma": Case("GEMMA", "GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}),
    "FlaxBert, masked": Case("BERT_MASKED_LM", "BertForMaskedLM", "BertConfig", _TEXT),
    "FlaxBert, classifier": Case("BERT", "BertForSequenceClassification", "BertConfig", _TEXT),
    "FlaxRoberta, masked": Case("ROBERTA_MASKED_LM", "RobertaForMaskedLM", "RobertaConfig", _TEXT),
    "FlaxRoberta, classifier": Case("ROBERTA", "RobertaForSequenceClassification", "RobertaConfig", _TEXT),
    "FlaxT5": Case("T5", "T5ForConditionalGeneration", "T5Config", _T5),
    "FlaxT5, gated": Case(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "FlaxViT": Case("VIT", "ViTForImageClassification", "ViTConfig", _IMAGE),
    "FlaxWhisper": Case("WHISPER", "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "FlaxCLIP": Case(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_TEXT, "eos_token_id": 49}, "vision_config": _IMAGE, "projection_dim": 12},
    ),
    "Tunix Llama 3": Case("LLAMA3", "LlamaForCausalLM", "LlamaConfig", _LONG, _tunix("llama3", "Llama3")),
    "Tunix Qwen 2": Case("QWEN2", "Qwen2ForCausalLM", "Qwen2Config", _DECODER, _tunix("qwen2", "Qwen2")),
    "Tunix Qwen 3": Case(
        "QWEN3", "Qwen3ForCausalLM", "Qwen3Config", {**_LONG, "head_dim": 6}, _tunix("qwen3", "Qwen3")
    ),
    "Tunix Qwen 3, experts": Case(
        "QWEN3_MOE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN_MOE, _tunix("qwen3", "Qwen3", **_MOE)
    ),
    "Tunix Gemma": Case(
        "GEMMA", "GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 8}, _tunix("gemma", "Gemma", **_GEMMA1)
    ),
    "Tunix Gemma 2": Case("GEMMA2", "Gemma2ForCausalLM", "Gemma2Config", _GEMMA, _tunix("gemma", "Gemma", **_GEMMA2)),
    "Tunix Gemma 2, as many heads": Case(
        "GEMMA2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GEMMA, "num_key_value_heads": 4},
        _tunix("gemma", "Gemma", **_GEMMA2, num_kv_heads=4),
    ),
    "Tunix Gemma 3": Case(
        "GEMMA3", "Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA, _tunix("gemma3", "Gemma3", sliding_window_size=32)
    ),
}


def inputs(case: Case) -> dict[str, np.ndarray]:
    """What the model is called with."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 49, (2, 8))
    if case.model.startswith("ViT"):
        return {"pixel_values": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    if case.model.startswith("Whisper"):
        features = rng.standard_normal((2, 10, 32)).astype(np.float32)
        return {"input_features": features, "decoder_input_ids": ids}
    if case.model.startswith("CLIP"):
        ids[:, -1] = 49
        return {"input_ids": ids, "pixel_values": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)}
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, ::-1].copy()}
        if case.model.startswith("T5")
        else {"input_ids": ids}
    )


def logits(outputs: Any) -> Any:
    """Of what a model of transformers returns."""
    return outputs.logits if hasattr(outputs, "logits") else outputs.logits_per_image

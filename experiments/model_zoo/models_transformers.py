"""Flax models of Hugging Face Transformers, with random weights."""

from __future__ import annotations

from typing import Any

import transformers as hf
from case import VOCAB, Case, cross_entropy, images, labels, next_token, tokens

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


def bert() -> Case:
    model = hf.FlaxBertForMaskedLM(hf.BertConfig(**SIZES))

    def loss(params, batch):
        return cross_entropy(model(batch, params=params).logits, batch)

    return Case(loss, model.params, (tokens(),))


def gpt2() -> Case:
    config = hf.GPT2Config(vocab_size=VOCAB, n_embd=192, n_layer=2, n_head=6, n_positions=128)
    model = hf.FlaxGPT2LMHeadModel(config)

    def loss(params, batch):
        return next_token(model(batch, params=params).logits, batch)

    return Case(loss, model.params, (tokens(),))


def llama() -> Case:
    model = hf.FlaxLlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2), input_shape=(1, 8))

    def loss(params, batch):
        return next_token(model(batch, params=params).logits, batch)

    return Case(loss, model.params, (tokens(),))


def vit() -> Case:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = hf.ViTConfig(**sizes, image_size=64, patch_size=8, num_labels=10)
    model = hf.FlaxViTForImageClassification(config)

    def loss(params, x, y):
        return cross_entropy(model(x, params=params).logits, y)

    return Case(loss, model.params, (images(3, 64, 64), labels(10)))


def resnet() -> Case:
    """With bottleneck blocks and running statistics."""
    config = hf.ResNetConfig(
        embedding_size=64, hidden_sizes=[256, 512], depths=[2, 2], layer_type="bottleneck", num_labels=10
    )
    model = hf.FlaxResNetForImageClassification(config, input_shape=(1, 64, 64, 3))

    def loss(params, x, y):
        return cross_entropy(model(x, params=params).logits, y)

    return Case(loss, model.params, (images(3, 64, 64), labels(10)))

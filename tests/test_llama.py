"""Llama's decoder: its numbers, its config, and what sharding rules it comes with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.models import llama
from lora_jax.models.rotary import frequencies
from lora_jax.recipes import save_products

TINY = llama.Config(48, 24, 2, 4, 40, num_key_value_heads=2, mlp_bias=True)
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THEIRS = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


def published(name):
    file = Path(__file__).parent.parent / "experiments" / "scale" / f"{name}.json"
    return json.loads(file.read_text())


def stacked(weights):
    """Hugging Face's names, a tensor for each layer, as our variables."""

    def of(path, _):
        _, first, *rest, last = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if first != "layers":
            return weights[{"embeddings": "model.embed_tokens", "last_norm": "model.norm", "head": "lm_head"}[first]]
        kind = "bias" if last == "bias" else "weight"
        names = (f"model.layers.{i}.{THEIRS['/'.join(rest)]}.{kind}" for i in range(TINY.num_hidden_layers))
        return jnp.stack([weights[name] for name in names])

    weights = {name.removesuffix(".weight") if "layers" not in name else name: x for name, x in weights.items()}
    shapes = jax.eval_shape(llama.Llama(TINY).init, jax.random.key(0), jnp.zeros((1, 1), int))
    return jax.tree_util.tree_map_with_path(of, shapes)


def test_the_numbers_are_those_of_an_independent_llama():
    reference, weights = peft_reference.model("llama")
    tokens = peft_reference.recorded("llama")["tokens"]

    @jax.jit
    def logits_and_gradient(params):
        made_anew = llama.Llama(TINY, remat=save_products)
        loss = jax.value_and_grad(lambda p: made_anew.apply(p, tokens, method="loss", chunk=8))
        return llama.Llama(TINY).apply(params, tokens), *loss(params)

    logits, loss, grads = logits_and_gradient(stacked(weights))
    (expected, logits_expected), of_weights = jax.jit(jax.value_and_grad(lambda w: reference(w)[::-1], has_aux=True))(
        weights
    )
    np.testing.assert_allclose(logits, logits_expected, atol=2e-5)
    np.testing.assert_allclose(loss, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, stacked(of_weights))


def test_a_mask_chooses_what_is_predicted():
    _, weights = peft_reference.model("llama")
    tokens, mask = jnp.arange(12).reshape(2, 6), jnp.zeros((2, 6)).at[1, 3].set(1)

    @jax.jit
    def loss_and_logits(params):
        model = llama.Llama(TINY)
        return model.apply(params, tokens, mask, method="loss"), model.apply(params, tokens)

    loss, logits = loss_and_logits(stacked(weights))
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(logits)[1, 2, tokens[1, 3]], rtol=1e-5)


def test_frequencies_are_stretched_as_llama_3_1_does():
    """As Hugging Face's `_compute_llama3_parameters` has it, one frequency at a time."""
    given = published("llama-3-8b") | {"rope_scaling": STRETCHED}
    config = llama.Config.from_huggingface(given)
    found = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    for i, turn in enumerate(found):
        plain = 500_000.0 ** (-2 * i / 128)
        length = 2 * math.pi / plain
        smooth = (8192 / length - 1) / (4 - 1)
        between = (1 - smooth) * plain / 8 + smooth * plain
        expected = plain if length < 8192 / 4 else plain / 8 if length > 8192 else between
        assert turn == pytest.approx(expected, rel=1e-6)


def test_a_config_as_transformers_5_writes_it():
    plain = published("llama-3-8b")
    theta = plain.pop("rope_theta")
    for rope in ({"rope_theta": theta}, {"rope_theta": theta, "rope_type": "default"}):
        given = {**plain, "rope_parameters": rope, "dtype": "bfloat16", "pretraining_tp": 1, "use_cache": True}
        assert llama.Config.from_huggingface(given) == llama.Config.from_huggingface(published("llama-3-8b"))
    given = {**plain, "rope_parameters": {"rope_theta": theta, **STRETCHED}}
    found = llama.Config.from_huggingface(given)
    assert found.rope_theta == theta and found.rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}, "rope_scaling": None}, "dynamic"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, 3"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"hidden_size": 4100}, "hidden_size is 4100: take a multiple of num_attention_heads, 32"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads is '8': make it a whole number"),
        ({"num_key_value_heads": -8}, "num_key_value_heads is -8: make it a whole number of 1 or more"),
        ({"rope_theta": "5e5"}, "rope_theta is '5e5': make it a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': make it true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': make it an object"),
        ({"rope_scaling": {**STRETCHED, "factor": 0}}, "factor is 0: make it a number above 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    ],
)
def test_what_the_decoder_does_not_do_is_an_error(change, message):
    given = published("llama-3-8b") | change
    with pytest.raises(ValueError, match=message):
        llama.Config.from_huggingface(given)


def test_a_config_that_lacks_a_size():
    with pytest.raises(ValueError, match="lacks hidden_size, num_attention_heads, intermediate_size"):
        llama.Config.from_huggingface({"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1})


@pytest.mark.parametrize(("name", "parameters", "trained"), [("llama-3-8b", 8_030_261_248, 41_943_040)])
def test_the_numbers_of_parameters_are_the_published_ones(name, parameters, trained):
    model = llama.Llama(llama.Config.from_huggingface(published(name)))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    sites = lora.sites(model.apply, params, tokens)
    linear = {".*/layers/.*/kernel": lora.LoRA(rank=16)}
    lora_params = jax.eval_shape(lambda: lora.split(jax.random.key(0), params, linear, sites=sites)[1])
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters
    assert sum(x.size for x in jax.tree.leaves(lora_params)) == trained
    assert len(lora_params) == 7 and all(sites[path].batch_axes == (0,) for path in lora_params)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_partition_rules_cover_every_parameter(tied, biased):
    config = llama.Config(
        64, 16, 2, 4, 32, tie_word_embeddings=tied, attention_bias=biased, mlp_bias=biased, num_key_value_heads=2
    )
    tokens = jnp.zeros((1, 4), int)
    params = jax.eval_shape(llama.Llama(config).init, jax.random.key(0), tokens)
    specs = lora.match_partition_rules(llama.partition_rules(config), params)["params"]
    assert specs["layers"]["attention"]["query"]["kernel"] == P(None, "fsdp", "tp")
    assert specs["layers"]["mlp"]["down"]["kernel"] == P(None, "tp", "fsdp")
    assert ("head" in specs) is not tied
    if biased:
        assert specs["layers"]["mlp"]["up"]["bias"] == P(None, "tp") and specs["layers"]["mlp"]["down"]["bias"] == P()

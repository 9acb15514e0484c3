"""Models against transformers on the same weights, what padding and packing change, and what generates."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_model_references import drawn
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.formats.huggingface import CheckpointError
from lora_jax.models import bert, gpt2, llama
from lora_jax.models.classifier import Classifier
from lora_jax.models.decoder import Decoder
from lora_jax.models.generate import generate, sample
from lora_jax.models.writing import config_of
from lora_jax.recipes import cross_entropy

REFERENCES = sorted(Path(__file__).parent.glob("fixtures/models/*.npz"))
DECODERS = [file.stem for file in REFERENCES if not file.stem.startswith("bert")]
UNSCANNED = ("gpt2", "qwen2", "gemma3")
# Compiling is what these tests take their time for.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def reference(name):
    with np.load(Path(__file__).parent / "fixtures" / "models" / f"{name}.npz") as file:
        found = dict(file)
    return {**found, **{key: json.loads(str(found[key])) for key in ("config", "shapes")}}


def write(directory, name, config=None, tensors=None):
    """A directory as transformers writes it."""
    found = reference(name)
    weights = {key: drawn(key, shape) for key, shape in found["shapes"].items()}
    (directory / "config.json").write_text(json.dumps({**found["config"], **(config or {})}))
    save_file({**weights, **(tensors or {})}, directory / "model.safetensors")


LLAMA = llama.Config(
    *(40, 8, 2, 2, 12),
    num_key_value_heads=1,
    sliding_window=4,
    layer_types=("full_attention", "sliding_attention"),
    final_logit_softcapping=3.0,
)
GPT2 = gpt2.Config(40, 8, 2, 2, max_position_embeddings=16)
IDS = np.random.default_rng(1).integers(1, 40, (2, 8))


def filled(model):
    """Random variables, no two of which are alike."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int)))
    draws = np.random.default_rng(0)
    return treedef.unflatten([jnp.asarray(draws.normal(0, 0.6, x.shape), jnp.float32) for x in leaves])


# Against transformers


@pytest.mark.parametrize("name", [file.stem for file in REFERENCES])
def test_logits_and_generated_tokens_are_those_of_transformers(tmp_path, name):
    write(tmp_path, name)
    expected = reference(name)
    model, params = models.load(tmp_path, **({"scan": False} if name in UNSCANNED else {}))
    ids, mask = expected["input_ids"], expected["attention_mask"]
    # Those without padding at the right; the last one's, five at the left, is put there, which changes nothing.
    prompts, masks = ([*rows[[0, 2]], np.roll(rows[3], -5)] for rows in (ids, mask))

    @quick
    def run(params):
        found = model.apply(params, ids, mask)
        if not isinstance(model, Decoder):
            return found, None
        options = {"max_new_tokens": 8, "eos": int(expected["eos"])}
        return found, generate(model, params, jnp.array(prompts), jnp.array(masks), **options)

    found, tokens = run(params)
    wanted = expected["hidden" if name == "bert" else "logits"]
    found = found if found.ndim == 2 else np.asarray(found)[mask.astype(bool)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    if tokens is not None:
        np.testing.assert_array_equal(tokens, expected["generated"])


def test_other_spellings_of_a_checkpoint(tmp_path):
    """Of GPT-2's first files: no prefix, causal masks, and the tied head all the same, which must be the table."""
    write(tmp_path, "gpt2")
    _, expected = models.load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    older = {key.removeprefix("transformer."): x for key, x in weights.items()}
    older |= {
        f"h.{i}.attn.{name}": np.ones((1, 1, 4, 4), np.float32) for i in range(3) for name in ("bias", "masked_bias")
    }
    table = weights["transformer.wte.weight"]
    save_file({**older, "lm_head.weight": table.copy()}, tmp_path / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, models.load(tmp_path)[1], expected))
    save_file({**older, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head"):
        models.load(tmp_path)


def test_a_model_of_no_known_type(tmp_path):
    write(tmp_path, "llama", {"model_type": "mixtral"})
    with pytest.raises(ValueError, match="'mixtral'; known are bert, gpt2, llama, mistral, qwen2, qwen3, gemma2"):
        models.load(tmp_path)


# Padding, packing, dtypes


@pytest.mark.parametrize("model", [llama.Llama(LLAMA), gpt2.GPT2(GPT2)], ids=["llama", "gpt2"])
def test_packed_documents_do_not_see_each_other(model):
    documents = IDS[0, :3], IDS[1, :4]
    packed = np.concatenate([*documents, [0]])[None]
    segments, mask = np.array([[1, 1, 1, 2, 2, 2, 2, 2]]), np.array([[1, 1, 1, 1, 1, 1, 1, 0]])
    apart = np.zeros((2, 4), int)
    apart[0, 1:], apart[1] = documents

    @quick
    def run(params):
        loss = model.apply(params, packed, None, mask, segments, method="loss", chunk=3)
        return model.apply(params, packed, mask, segments), model.apply(params, apart, apart != 0), loss

    together, alone, loss = run(filled(model))
    np.testing.assert_allclose(together[0, :7], np.concatenate([alone[0, 1:], alone[1]]), atol=1e-5)
    places = [0, 1, 3, 4, 5]  # whose next token is of the same document
    scores = jax.nn.log_softmax(together[0])[np.array(places), packed[0, 1:][places]]
    np.testing.assert_allclose(loss, -np.mean(scores), rtol=1e-5)


def test_the_loss_of_bent_logits():
    draws = np.random.default_rng(0)
    x, head = (jnp.asarray(draws.normal(size=shape), jnp.float32) for shape in ((5, 4), (4, 7)))
    labels = jnp.arange(5)

    @quick
    def run(x, head):
        def plain(x, head):
            return -jnp.mean(jax.nn.log_softmax(2 * jnp.tanh(x @ head / 2))[labels, labels])

        def chunked(x, head, recompute):
            return cross_entropy(x, head, labels, chunk=2, softcap=2.0, recompute=recompute)

        losses = plain, functools.partial(chunked, recompute=False), functools.partial(chunked, recompute=True)
        return [jax.value_and_grad(loss, (0, 1))(x, head) for loss in losses]

    expected, *found = run(x, head)
    jax.tree.map(lambda *given: np.testing.assert_allclose(given[1:], [given[0]] * 2, atol=1e-6), expected, *found)


@pytest.mark.standard_promotion  # jax.nn.dot_product_attention itself asks for it
@pytest.mark.parametrize("model", [llama.Llama(LLAMA), gpt2.GPT2(GPT2)], ids=["llama", "gpt2"])
def test_bfloat16_stays_bfloat16_and_the_loss_is_float32(model):
    for given in (model.clone(param_dtype=jnp.bfloat16), model.clone(dtype=jnp.bfloat16)):
        shapes = jax.eval_shape(given.init, jax.random.key(0), IDS)
        assert jax.eval_shape(given.apply, shapes, IDS, IDS > 3).dtype == jnp.bfloat16
        assert jax.eval_shape(functools.partial(given.apply, method="loss"), shapes, IDS).dtype == jnp.float32
        empty = functools.partial(given.apply, batch=2, slots=9, method="empty_cache")
        cache = jax.eval_shape(empty, shapes)
        logits, after = jax.eval_shape(functools.partial(given.apply, method="decode"), shapes, IDS, cache)
        assert {x.dtype for x in (logits, *cache[:2])} == {jnp.dtype(jnp.bfloat16)} and after == cache


# Generation


@pytest.mark.parametrize("model", [llama.Llama(LLAMA), gpt2.GPT2(GPT2, scan=False)], ids=["scanned", "not"])
def test_generate_lifts(model):
    """Under lift's own law, which makes an error of any weight that is formed."""
    params = filled(model)
    rules = {".*/(attention|mlp)/.*/kernel": lora.LoRA(rank=2), ".*/embeddings/embedding": lora.LoRA(rank=2)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=lora.sites(model.apply, params, IDS))
    lora_params = jax.tree.map(lambda x: x + 0.3, lora_params)
    mask = np.arange(8) >= np.array([[0], [3]])

    @quick
    def run(params):
        return lora.lift(lambda params: generate(model, params, IDS, mask, max_new_tokens=6))(params)

    found = run(lora.attach(frozen, lora_params))
    np.testing.assert_array_equal(found, run(lora.merge(frozen, lora_params)))
    assert (found != run(params)).any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.71}, {1, 3, 0}),
        ({"top_k": 3, "top_p": 0.5}, {1, 3}),  # of the three: 0.47, 0.35, 0.18
        ({"temperature": 0.01}, {1}),
    ],
)
def test_what_may_be_drawn(options, expected):
    logits = jnp.log(jnp.array([[0.15, 0.4, 0.1, 0.3, 0.05]]).repeat(500, 0))
    assert {*np.asarray(sample(jax.random.key(0), logits, **options)).tolist()} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 10}, "17 together at most"),
        ({"max_new_tokens": 0}, "1 or more"),
        ({"max_new_tokens": 2, "temperature": 0}, "temperature is 0: make it above 0"),
        ({"max_new_tokens": 2, "top_p": 1.5}, "top_p is 1.5: make it above 0, 1 at most"),
        ({"max_new_tokens": 2, "top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 2, "attention_mask": np.ones((2, 5))}, r"attention_mask is \(2, 5\): make it \(2, 8\)"),
    ],
)
def test_what_generate_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        generate(gpt2.GPT2(GPT2), {}, IDS, **options)


# What a config.json may not say


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "mish"}, "hidden_act is 'mish'"),
        ("llama", {"sliding_window": 4}, "sliding_window is 4"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "rope_scaling is"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"] * 2}, "leave layer_types out"),
        ("qwen2", {"attention_bias": False}, "attention_bias is False"),
        ("qwen2", {"layer_types": ["full_attention"]}, "once for each layer"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "once for each layer"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ],
)
def test_what_a_config_asks_for_in_vain(name, change, message):
    kind = gpt2 if name == "gpt2" else llama
    with pytest.raises(ValueError, match=message):
        kind.Config.from_huggingface({**reference(name)["config"], **change})


def test_what_a_config_means_that_leaves_fields_out():
    sizes = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 32}
    sizes |= {"intermediate_size": 8}
    found = {kind: llama.Config.from_huggingface({"model_type": kind, **sizes}) for kind in ("llama", "mistral")}
    assert (found["llama"].num_key_value_heads, found["mistral"].num_key_value_heads) == (32, 8)
    assert (found["llama"].sliding_window, found["mistral"].sliding_window) == (None, 4096)
    qwen = llama.Config.from_huggingface(
        {"model_type": "qwen3", **sizes, "use_sliding_window": True, "max_window_layers": 2}
    )
    assert qwen.head_dim == 128 and qwen.layer_types == ("full_attention", "full_attention", "sliding_attention")
    local = {"rope_type": "default", "rope_theta": 5e4}
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": local}
    gemma = llama.Config.from_huggingface({"model_type": "gemma3_text", **sizes, "rope_parameters": rope})
    assert (gemma.rope_theta, gemma.rope_local_base_freq, gemma.rope_scaling.factor) == (1e6, 5e4, 8.0)
    assert gemma.tie_word_embeddings and gemma.layer_types == ("sliding_attention",) * 3


@pytest.mark.parametrize("name", [file.stem for file in REFERENCES])
def test_a_config_is_written_as_it_is_read(name):
    kind = {"gpt2": gpt2.GPT2, "bert": bert.Bert, "bert_classifier": Classifier}.get(name, llama.Llama)
    config = sys.modules[kind.__module__].Config.from_huggingface(reference(name)["config"])
    content = json.loads(json.dumps(config_of(kind(config))))
    assert content["model_type"] == reference(name)["config"]["model_type"]
    assert type(config).from_huggingface(content) == config

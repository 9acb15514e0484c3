"""Models against transformers on the same weights, what padding and packing change, and what generates."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.make_model_references import drawn
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax import models
from lora_jax.formats.huggingface import CheckpointError
from lora_jax.models import gpt2, llama
from lora_jax.models.decoder import Decoder
from lora_jax.models.generate import generate, sample

REFERENCES = sorted(Path(__file__).parent.glob("fixtures/models/*.npz"))
DECODERS = [file.stem for file in REFERENCES if file.stem != "bert"]
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


@functools.cache
def tiny(kind, **options):
    """A small decoder and random variables, no two of which are alike."""
    config = (
        gpt2.Config(40, 8, 2, 2, max_position_embeddings=16)
        if kind is gpt2
        else llama.Config(40, 8, 2, 2, 12, num_key_value_heads=1, sliding_window=4, layer_types=tuple(LAYERS))
    )
    model = (gpt2.GPT2 if kind is gpt2 else llama.Llama)(config, **options)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int)))
    draws = np.random.default_rng(0)
    return model, treedef.unflatten([jnp.asarray(draws.normal(0, 0.6, x.shape), jnp.float32) for x in leaves])


LAYERS = ["full_attention", "sliding_attention"]
IDS = np.random.default_rng(1).integers(1, 40, (2, 8))


@pytest.mark.parametrize("name", [file.stem for file in REFERENCES])
def test_logits_and_generated_tokens_are_those_of_transformers(tmp_path, name):
    write(tmp_path, name)
    expected = reference(name)
    model, params = models.load(tmp_path, **({"scan": False} if name in UNSCANNED else {}))
    ids, mask = expected["input_ids"], expected["attention_mask"]
    prompts = [0, 2, 3]  # no padding at the right

    @quick
    def run(params):
        found = model.apply(params, ids, mask)
        if not isinstance(model, Decoder):
            return found, None
        options = {"max_new_tokens": 8, "eos": int(expected["eos"])}
        return found, generate(model, params, ids[prompts], mask[prompts], **options)

    found, tokens = run(params)
    wanted = expected["hidden" if tokens is None else "logits"]
    np.testing.assert_allclose(np.asarray(found)[mask.astype(bool)], wanted, rtol=0, atol=2e-5)
    if tokens is not None:
        np.testing.assert_array_equal(tokens, expected["generated"])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", [llama, gpt2])
def test_generate_lifts(kind, scan):
    model, params = tiny(kind, scan=scan)
    rules = {".*/(attention|mlp)/.*/kernel": lora.LoRA(rank=2), ".*/embedding": lora.LoRA(rank=2)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=lora.sites(model.apply, params, IDS))
    lora_params = jax.tree.map(lambda x: x + 0.3, lora_params)
    mask = np.arange(8) >= np.array([[0], [3]])

    @quick
    def run(params):
        return lora.lift(lambda params: generate(model, params, IDS, mask, max_new_tokens=6))(params)

    found = run(lora.attach(frozen, lora_params))
    np.testing.assert_array_equal(found, run(lora.merge(frozen, lora_params)))
    assert (found != run(params)).any()

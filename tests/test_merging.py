"""A checkpoint merged tensor by tensor is what `lora_jax.merge` makes of the loaded model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import all_adaptable, split_at_random

import lora_jax as lora
from lora_jax import models, tree
from lora_jax.formats import huggingface
from lora_jax.models import bert, gpt2, llama

IDS = jnp.array([[1, 5, 9, 2], [3, 3, 7, 0]])
MODELS = {
    "llama": llama.Llama(llama.Config(40, 16, 2, 4, 24, num_key_value_heads=2)),
    "gpt2": gpt2.GPT2(gpt2.Config(40, 16, 2, 4, max_position_embeddings=16)),
    "bert": bert.Bert(bert.Config(40, 16, 2, 4, 24)),
}
VARIANTS = {
    "LoRA": lora.LoRA(2, alpha=7),
    "stabilized": lora.LoRA(2, alpha=3, scaling="rank_stabilized"),
    "LoRAFA": lora.LoRAFA(2),
    "DoRA": lora.DoRA(2, alpha=3),
    "VeRA": lora.VeRA(5),
    "LoHa": lora.LoHa(2, alpha=3),
    "LoKr": lora.LoKr(2),
    "LoKr of products": lora.LoKr(1, decompose_both=True, factor=4),
    "AdaLoRA": lora.AdaLoRA(2, alpha=3),
    "LoRAXS": lora.LoRAXS(2),
    "IA3": lora.IA3(),
    "IA3 of inputs": lora.IA3(side="in"),
}


@functools.cache
def shapes(name):
    model = MODELS[name]
    return jax.eval_shape(model.init, jax.random.key(0), IDS)


@functools.cache
def sites(name):
    return lora.sites(MODELS[name].apply, shapes(name), IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of a model: its directory, opened, and its parameters."""

    @functools.cache
    def of(name):
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes(name))
        folder = tmp_path_factory.mktemp(name) / "base"
        models.save(folder, MODELS[name], params, max_shard_size=4000)
        model, params = models.load(folder)
        return models.opened(model, folder), params

    return of


def adapted(name, params, variant):
    """Random adapters on all leaves that a variant suits, and Full on all others but those that it does not."""
    few = all_adaptable(variant)

    def rule(path, site):
        return few(path, site) or (lora.Full() if site.kind == "other" else None)

    return split_at_random(params, rule, sites(name))[1]


def check_same(found, expected, ulps=0):
    for (path, a), b in zip(tree.flatten(found)[0].items(), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        if ulps == 0:
            assert a.tobytes() == b.tobytes(), path
        else:
            np.testing.assert_array_max_ulp(a, b, ulps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_as_in_memory(base, tmp_path, name, variant):
    checkpoint, params = base(name)
    lora_params = adapted(name, params, VARIANTS[variant])
    merged = huggingface.merge(checkpoint, shapes(name), lora_params, models.names(MODELS[name]))
    huggingface.write(tmp_path / "merged", merged, source=checkpoint)
    _, found = models.load(tmp_path / "merged")
    expected = lora.merge(params, lora_params)
    d = [
        (p, np.max(np.abs(np.asarray(a) - np.asarray(b)) / np.spacing(np.abs(np.asarray(b)))))
        for (p, a), b in zip(tree.flatten(found)[0].items(), jax.tree.leaves(expected))
    ]
    print(variant, name, sorted(d, key=lambda x: -x[1])[:3])
    check_same(found, expected, 1)

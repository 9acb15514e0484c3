"""PEFT's own folders: our logits with them are PEFT's, what is saved again has the same bits, and training agrees."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import peft_folders
import pytest
from peft_folders import NAMES, expected, files, folders, loaded, model, model_of, ours

import lora_jax as lora
from lora_jax.formats.peft import load, save

TRAINED = sorted(name for name in folders() if f"{name}-trained" in folders())
# One tensor is theirs as table and head, and their adapters are not one.
APART = ["tied-apart", "tied-table"]


@functools.cache
def jitted(name):
    return jax.jit(model(name)[0])


@pytest.mark.parametrize("name", [name for name in folders() if name not in TRAINED + APART])
def test_logits_and_bits(name, tmp_path):
    of = model_of(name)
    _, params = model(of)
    lora_params = loaded(name)
    logits, theirs = jitted(of)(lora.merge(params, lora_params)), expected()[f"{name}/logits"]
    assert abs(logits - theirs).max() < 1e-5 * max(1, abs(theirs).max())

    save(tmp_path / "saved", lora_params, NAMES[of], base=params)
    (config, tensors), (their_config, theirs) = files(tmp_path / "saved"), files(peft_folders.FOLDER / name)
    for key in ("peft_type", "bias", "use_rslora", "use_dora", "r", "lora_alpha", "alpha", "fan_in_fan_out"):
        if name != "gpt2-lora-bias" and key in config and key in their_config:
            assert config[key] == their_config[key]
    # Copies of the base stay where they are, and what was added to a bias is in it.
    left = {key for key in theirs if key.endswith((".base_layer.weight", ".lora_B.bias"))}
    added = {key for key in tensors if name == "gpt2-lora-bias" and key.endswith(".base_layer.bias")}
    assert tensors.keys() - added == theirs.keys() - left
    for key in tensors.keys() - added:
        assert tensors[key].dtype == theirs[key].dtype and tensors[key].shape == theirs[key].shape
        assert tensors[key].tobytes() == theirs[key].tobytes()
    assert_same(load(tmp_path / "saved", params, NAMES[of]), lora_params)


def assert_same(found, lora_params):
    """The same structure, so that nothing is traced again, and the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(lora_params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(lora_params), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", APART)
def test_adapters_of_tied_layers_that_are_not_tied(name):
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        loaded(name)


@pytest.mark.standard_promotion  # optax's Adam
@pytest.mark.parametrize("name", TRAINED)
def test_thirty_steps_from_their_beginning(name):
    loss, params, names = ours(model_of(name))
    lora_params, after = (load(peft_folders.FOLDER / folder, params, names) for folder in (name, f"{name}-trained"))
    tx = lora.optimizer(optax.adam(1e-2, eps=1e-8))

    @jax.jit
    def train(lora_params):
        def step(carry, _):
            lora_params, state = carry
            value, grads = jax.value_and_grad(lambda x: lora.lift(loss)(lora.attach(params, x)))(lora_params)
            updates, state = tx.update(grads, state, lora_params)
            return (optax.apply_updates(lora_params, updates), state), value

        (lora_params, _), losses = jax.lax.scan(step, (lora_params, tx.init(lora_params)), None, length=30)
        return lora_params, losses

    found, losses = train(lora_params)
    theirs = expected()[f"{name}/losses"]
    assert len(theirs) == 31 and theirs[-1] < theirs[0] - 1
    assert max(abs(losses - theirs[:30])) < 3e-5
    assert jax.tree.structure(found) == jax.tree.structure(after)
    largest = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), found, after)
    assert max(jax.tree.leaves(largest)) < 1e-4

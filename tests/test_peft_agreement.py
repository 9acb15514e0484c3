"""Law 9: forward, gradients and training agree with Hugging Face PEFT, step by step, in float32.

`fixtures/make_peft_reference.py` ran PEFT on tiny models, and recorded where it began, its gradients and its losses.
"""

from __future__ import annotations

import functools
import json
import re

import jax
import numpy as np
import optax
import peft_reference
import pytest
from checks import error

import lora_jax as lora
from peft_reference import MODELS, RUNS, model, recorded

pytestmark = pytest.mark.standard_promotion  # optax's Adam


@functools.cache
def sites(name):
    result, params = model(name)
    return lora.sites(lambda params: result(params)[1], params)


def rules(run, config):
    targets = "|".join(map(re.escape, config["target_modules"]))
    return {rf"(.*\.)?({targets})\.weight": peft_reference.variant(run, config)}


@functools.cache
def prepared(name):
    """What stays frozen, and a function from a group's name to the adapters with its tensors."""
    of, run = name.split("-", 1)
    file, (_, params) = recorded(name), model(of)
    own = rules(run, json.loads(str(file["config"])))
    _, shapes = jax.eval_shape(lambda params: lora.split(jax.random.key(0), params, own, sites=sites(of)), params)
    changed = MODELS[of].from_torch({key: x for key, x in file["frozen"].items() if key in params})

    def adapters(group):
        left = dict(file[group])
        filled = {path: peft_reference.filled(adapter, path, left) for path, adapter in shapes.items()}
        assert not left  # every tensor has its place
        return filled

    return {**params, **jax.device_put(changed)}, adapters


@functools.cache
def step(name):
    """One step of Adam: compiled once for everything that is asked of a run."""
    result, _ = model(name.split("-")[0])
    tx = lora.optimizer(optax.adam(float(recorded(name)["learning_rate"]), eps=1e-8))

    @jax.jit
    def step(lora_params, state, frozen):
        def objective(lora_params):
            logits, loss = lora.lift(result)(lora.attach(frozen, lora_params))
            return loss, logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, loss, logits, grads

    return step, tx


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_models_agree_with_theirs(name):
    result, params = model(name)
    logits, loss = jax.jit(result)(params)
    assert error(logits, recorded(name)["result"]) < 1e-6
    assert float(loss) == pytest.approx(float(recorded(name)["loss"]), rel=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps(name):
    frozen, adapters = prepared(name)
    run, tx = step(name)
    lora_params, losses = adapters("init"), []
    state = tx.init(lora_params)
    for i in range(21):
        lora_params, state, loss, _, grads = run(lora_params, state, frozen)
        losses.append(float(loss))
        if i == 0:
            assert error(grads, adapters("gradient")) < 1e-5
    expected = recorded(name)["losses"]
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", RUNS)
def test_at_random_factors(name):
    frozen, adapters = prepared(name)
    run, tx = step(name)
    lora_params = adapters("random")
    _, _, loss, logits, grads = run(lora_params, tx.init(lora_params), frozen)
    assert float(loss) == pytest.approx(float(recorded(name)["random_loss"]), rel=1e-6)
    assert error(logits, recorded(name)["random_result"]) < 1e-6
    assert error(grads, adapters("random_gradient")) < 1e-5

"""Law 9: forward, gradients and training agree with Hugging Face PEFT, step by step, in float32.

`fixtures/make_peft_reference.py` ran PEFT on tiny models, and recorded where it began, its gradients and its losses.
"""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import optax
import peft_reference
import pytest
from checks import error
from peft_reference import MODELS, RUNS, model, recorded

import lora_jax as lora
from lora_jax import budget

pytestmark = pytest.mark.standard_promotion  # optax's Adam


@functools.cache
def sites(name):
    result, params = model(name)
    return lora.sites(lambda params: result(params)[1], params)


def rules(name):
    _, run = name.split("-", 1)
    return peft_reference.rules(run, json.loads(str(recorded(name)["config"])))


@functools.cache
def prepared(name):
    """What stays frozen, and a function from a group's name to the adapters with its tensors."""
    of = name.split("-")[0]
    file, (_, params) = recorded(name), model(of)
    _, shapes = jax.eval_shape(lambda: lora.split(jax.random.key(0), params, rules(name), sites=sites(of)))
    changed = {key: x for key, x in file["frozen"].items() if key in params}
    shared = {key: x for key, x in file["frozen"].items() if key not in params}

    def adapters(group):
        left = {**file[group], **{key: x * ("gradient" not in group) for key, x in shared.items()}}
        filled = {path: peft_reference.filled(adapter, path, left) for path, adapter in shapes.items()}
        assert not left  # every tensor has its place
        return filled

    return {**params, **jax.device_put(MODELS[of].from_torch(changed))}, adapters


def attached(frozen, lora_params):
    """As `lora.attach`, and with the biases scaled that IA³ scales in PEFT along with a layer's outputs."""
    vectors = {path: x.factors["scale"] for path, x in lora_params.items() if getattr(x.variant, "side", "") == "out"}
    biases = {path.removesuffix("weight") + "bias": vector for path, vector in vectors.items()}
    scaled = {path: frozen[path] * vector for path, vector in biases.items() if path in frozen}
    return {**lora.attach(frozen, lora_params), **scaled}


def penalty(name, lora_params):
    """What PEFT's AdaLoRA adds to the loss of a language model."""
    of, run, *_ = name.split("-")
    return 0.5 * budget.orthogonality(lora_params) if run == "adalora" and of != "conv" else 0.0


@functools.cache
def step(name):
    """One step of Adam: compiled once for everything that is asked of a run."""
    result, _ = model(name.split("-")[0])
    tx = lora.optimizer(optax.adam(float(recorded(name)["learning_rate"]), eps=1e-8))

    @jax.jit
    def step(lora_params, state, frozen):
        def objective(lora_params):
            logits, loss = lora.lift(result)(attached(frozen, lora_params))
            return loss + penalty(name, lora_params), logits

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


def trained(name, frozen, lora_params, after=lambda lora_params, grads: lora_params):
    """The losses of training, and the gradients of its first step; `after` each step adapters may be changed."""
    run, tx = step(name)
    state, losses, first = tx.init(lora_params), [], None
    for _ in recorded(name)["losses"]:
        lora_params, state, loss, _, grads = run(lora_params, state, frozen)
        losses.append(float(loss))
        first = first or grads
        lora_params = after(lora_params, grads)
    return np.array(losses), first


def pruning(name, lora_params):
    """What AdaLoRA does to adapters after a step, and the entries that it has left, by path, after each step."""
    kept = {path: [] for path in lora_params}
    if not name.endswith("budget"):
        return (lambda lora_params, grads: lora_params), kept
    config = json.loads(str(recorded(name)["config"]))
    schedule = budget.Schedule(*(config[key] for key in ("total_step", "target_r", "tinit", "tfinal", "deltaT")))
    allocate, state = jax.jit(functools.partial(budget.allocate, schedule)), budget.init(lora_params)

    def after(lora_params, grads):
        nonlocal state
        lora_params, state = allocate(state, lora_params, grads)
        for path, adapter in lora_params.items():
            kept[path].append(adapter.factors["E"] != 0)
        return lora_params

    return after, kept


@pytest.fixture(scope="module", params=RUNS)
def name(request):
    """A run; with this scope pytest puts its tests next to each other, so that one process compiles its step."""
    return request.param


def test_twenty_steps(name):
    frozen, adapters = prepared(name)
    after, kept = pruning(name, adapters("init"))
    losses, first = trained(name, frozen, adapters("init"), after)
    expected = recorded(name)["losses"]
    assert len(expected) == 21 and expected[-1] < expected[0]
    assert error(first, adapters("gradient")) < 1e-5
    assert max(abs(losses - expected)) < 3e-5
    for key, entries in recorded(name).get("kept", {}).items():
        np.testing.assert_array_equal(kept[key.replace("lora_E", "weight")][:20], entries[..., 0])


def test_at_random_factors(name):
    frozen, adapters = prepared(name)
    run, tx = step(name)
    lora_params = adapters("random")
    _, _, loss, logits, grads = run(lora_params, tx.init(lora_params), frozen)
    assert float(loss) == pytest.approx(float(recorded(name)["random_loss"]), rel=1e-6)
    assert error(logits, recorded(name)["random_result"]) < 1e-6
    assert error(grads, adapters("random_gradient")) < 1e-5


@pytest.mark.parametrize("name", [name for name in RUNS if name.endswith(("pissa", "olora"))], indirect=True)
def test_initializations_from_the_weight(name):
    """Singular vectors are so up to their signs, which A·B, the base that is left and Adam's steps do not see."""
    of = name.split("-")[0]
    theirs, adapters = prepared(name)
    frozen, lora_params = lora.split(jax.random.key(0), model(of)[1], rules(name), sites=sites(of))
    for path, adapter in adapters("init").items():
        rank, s = adapter.variant.rank, np.linalg.svd(model(of)[1][path], compute_uv=False)
        # How far rounding turns singular vectors depends on how far apart the values are (Wedin 1972).
        limit = 4 * np.finfo(np.float32).eps * s[0] / (s[rank - 1] - s[rank])
        assert error(frozen[path], theirs[path]) < limit
        products = (x.factors["A"] @ x.factors["B"] for x in (lora_params[path], adapter))
        assert error(*products) < limit
    assert max(abs(trained(name, frozen, lora_params)[0] - recorded(name)["losses"])) < 3e-5

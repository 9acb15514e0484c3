"""What lifting costs before anything runs: bodies are traced once, and no layer adds more equations than it needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from checks import all_adaptable
from jax import lax

import lora_jax as lora

LAYERS, D = 6, 8
X = jnp.ones((3, D))
PARAMS = {f"layer{i}": {"w": jnp.full((D, D), 0.1 * i)} for i in range(LAYERS)}


def lifted(model, params=PARAMS):
    sites = lora.sites(model, params, X)
    frozen, lora_params = lora.split(jax.random.key(0), params, all_adaptable(lora.LoRA(2)), sites=sites)
    return jax.make_jaxpr(lambda lp: lora.lift(model)(lora.attach(frozen, lp), X))(lora_params)


def bodies(jaxpr, name):
    """The bodies of a jaxpr's calls of that name, each once."""
    found = {}
    for eqn in jaxpr.eqns:
        if eqn.params.get("name") == name or eqn.primitive.name in (name, "remat2" if name == "checkpoint" else name):
            found[id(eqn.params["jaxpr"])] = eqn.params["jaxpr"]
    return list(found.values())


def count(jaxpr, name):
    return sum(eqn.params.get("name") == name or eqn.primitive.name == name for eqn in jaxpr.eqns)


def test_a_jitted_layer_is_traced_once_for_all_leaves():
    @jax.jit
    def layer(x, p):
        return jnp.tanh(x @ p["w"])

    def model(params, x):
        for i in range(LAYERS):
            x = layer(x, params[f"layer{i}"])
        return x

    jaxpr = lifted(model)
    assert count(jaxpr, "layer") == LAYERS
    assert len(bodies(jaxpr, "layer")) == 1


def test_a_checkpointed_layer_is_traced_once_for_all_leaves():
    layer = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))

    def model(params, x):
        for i in range(LAYERS):
            x = layer(x, params[f"layer{i}"]["w"])
        return x

    assert len(bodies(lifted(model), "checkpoint")) == 1


def test_products_of_one_form_share_a_body():
    def model(params, x):
        for i in range(LAYERS):
            x = jnp.tanh(x @ params[f"layer{i}"]["w"])
        return x

    jaxpr = lifted(model)
    assert len(bodies(jaxpr, "_multiply")) == 1
    assert len(jaxpr.eqns) == 2 * LAYERS  # a product and a tanh for each, and nothing else


def test_layers_of_another_form_are_traced_apart():
    """A shared body is right for its own rank alone."""
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def model(params, x):
        return layer(layer(x, params["layer1"]["w"]), params["layer2"]["w"])

    params = {name: PARAMS[name] for name in ("layer1", "layer2")}
    rules = {"layer1/w": lora.LoRA(1), "layer2/w": lora.LoRA(3)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    lora_params = jax.tree.map(lambda a: a + 0.1, lora_params)
    found = lora.lift(model)(lora.attach(frozen, lora_params), X)
    assert jnp.allclose(found, model(lora.merge(frozen, lora_params), X), rtol=1e-5)


def test_the_function_is_traced_once():
    calls = []

    def model(params, x):
        calls.append(1)
        return jnp.tanh(x @ params["layer1"]["w"])

    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, {"layer1/w": lora.LoRA(2)})
    step = jax.jit(jax.grad(lambda lp: lora.lift(model)(lora.attach(frozen, lp), X).sum()))
    step(lora_params)
    step(jax.tree.map(jnp.ones_like, lora_params))
    assert len(calls) == 1


def test_an_error_in_a_shared_body_names_the_leaf_that_came_first():
    layer = jax.jit(lambda x, w: x @ jnp.sort(w))

    def model(params, x):
        return layer(layer(x, params["layer3"]["w"]), params["layer4"]["w"])

    params = {name: PARAMS[name] for name in ("layer3", "layer4")}
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(1)})
    with pytest.raises(lora.MaterializeError, match=r"'layer3/w' \(8, 8\) reaches 'sort' at test_tracing.py:\d+"):
        lora.lift(model)(lora.attach(frozen, lora_params), X)


def test_a_scan_is_noted_once():
    def model(params, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    site = lora.sites(model, {"w": jnp.ones((4, D, D))}, X)["w"]
    assert [(use.kind, use.times) for use in site.uses] == [("linear", 4)]

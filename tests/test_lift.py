"""`lift` takes functions as they are: arguments and results of any kind, in their dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, normal, randomized

import lora_jax as lora

PARAMS = {
    "up": normal(8, 16, seed=1, scale=0.3),
    "down": normal(16, 8, seed=2, scale=0.3),
}
X = normal(16, 8, seed=3)
FROZEN, INITIAL = lora.split(jax.random.key(0), PARAMS, {".*": lora.LoRA(rank=2, alpha=4)})
LORA_PARAMS = randomized(INITIAL, 0.2)


def model(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def lifted(lora_params, x):
    return lora.lift(model)(lora.attach(FROZEN, lora_params), x)


def merged(lora_params, x):
    return model(lora.merge(FROZEN, lora_params), x)


def loss(fun):
    return lambda *args: jnp.sum(jnp.sin(fun(*args)))


def test_bfloat16_merges_round_once():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w": (64, 48), "A": (64, 4), "B": (4, 48)}
    w, a, b = (jax.random.normal(k, s).astype(jnp.bfloat16) for k, s in zip(keys, shapes.values(), strict=True))
    frozen, lora_params = lora.split(keys[0], {"w": w}, {"w": lora.LoRA(rank=4, dtype="bfloat16")})
    lora_params["w"].factors.update(A=a, B=b)
    wide = [x.astype(jnp.float32) for x in (w, a, b)]
    exact = wide[0] + jnp.matmul(wide[1], wide[2], precision="highest")
    np.testing.assert_array_equal(lora.merge(frozen, lora_params)["w"], exact.astype(jnp.bfloat16))


def test_double_precision():
    with jax.enable_x64():
        params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        rules = {".*": lora.LoRA(rank=2, dtype="float64")}
        frozen, lora_params = lora.split(jax.random.key(0), params, rules)
        lora_params, x = randomized(lora_params, 0.2), X.astype(jnp.float64)
        found = jax.grad(lambda lp: loss(model)(lora.merge(frozen, lp), x))(lora_params)
        expected = jax.grad(lambda lp: loss(lora.lift(model))(lora.attach(frozen, lp), x))(lora_params)
        worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), found, expected)
        assert 0 < max(jax.tree.leaves(worst)) < 1e-13


ATTACHED = lora.attach(FROZEN, LORA_PARAMS)


def test_attached_trees_are_arguments_of_jit():
    expected = merged(LORA_PARAMS, X)
    traces = []

    @jax.jit
    def run(attached, x):
        traces.append(1)
        return lora.lift(model)(attached, x)

    assert error(run(ATTACHED, X), expected) < 1e-5
    run(lora.attach(FROZEN, INITIAL), X)
    assert len(traces) == 1
    inner = lora.lift(jax.jit(model))
    assert error(inner(ATTACHED, X), expected) < 1e-5


def test_arguments_of_any_kind_pass_through():
    class Config:
        scale = 2.0

    @lora.lift
    def fun(x, *, name, params, flag=True, config=None, activation=jnp.tanh, sizes=(), count=1):
        assert name == "a name"
        assert flag is False
        assert sizes == [3, "four", None]
        for _ in range(count):
            x = activation(x @ params["up"]) @ params["down"] * config.scale
        return x

    keywords = {"name": "a name", "flag": False, "config": Config(), "sizes": [3, "four", None], "count": 2}
    found = fun(X, params=ATTACHED, **keywords)
    assert error(found, fun(X, params=lora.merge(FROZEN, LORA_PARAMS), **keywords)) < 1e-5


def test_several_attached_trees():
    found = lora.lift(lambda a, x, b: model(a, x) - model(b, x))(ATTACHED, X, b=ATTACHED)
    assert not found.any()


def test_trees_with_the_same_paths_are_told_apart():
    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, {".*": lora.LoRA(rank=2)})
    one, other = (lora.attach(frozen, lora_params) for _ in range(2))
    with pytest.raises(lora.UnusedError, match=r"'down \(2\)', 'up \(2\)'"):
        lora.lift(lambda one, other, x: x @ one["up"] @ one["down"])(one, other, jnp.ones((2, 8)))


def test_results_of_any_kind_pass_through():
    @lora.lift
    def fun(params, x):
        y = x @ params["up"]
        return {"y": y, "name": "a name", "none": None, "n": 3, "array": np.arange(3), "fun": jnp.tanh, "same": params}

    out = fun(ATTACHED, X)
    assert (out["name"], out["none"], out["n"], out["fun"]) == ("a name", None, 3, jnp.tanh)
    assert isinstance(out["array"], np.ndarray)
    assert error(out["y"], X @ lora.merge(FROZEN, LORA_PARAMS)["up"]) < 1e-5
    assert error(lora.lift(model)(out["same"], X), merged(LORA_PARAMS, X)) < 1e-5


def test_a_view_that_is_returned_stays_factored():
    """So a tree may be prepared by one function, cast or transposed, and used by another."""
    half = lora.lift(lambda params: jax.tree.map(lambda w: (0.5 * w).T, params))(ATTACHED)
    assert isinstance(half["up"], lora.Factored)
    found = lora.lift(lambda params, x: x @ params["up"].T)(half | {"down": FROZEN["down"]}, X)
    assert error(found, 0.5 * X @ lora.merge(FROZEN, LORA_PARAMS)["up"]) < 1e-5


def test_plain_trees_need_no_lifting():
    np.testing.assert_array_equal(lora.lift(model)(PARAMS, X), model(PARAMS, X))


def test_it_keeps_the_function_s_name():
    assert lora.lift(model).__name__ == "model"


def test_bfloat16_stays_bfloat16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=2)})
    jaxpr = jax.make_jaxpr(lora.lift(model))(lora.attach(frozen, lora_params), X.astype(jnp.bfloat16))
    assert [aval.dtype for aval in jaxpr.out_avals] == [jnp.bfloat16]
    wide = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == jnp.float32]
    assert all(aval.size <= 2 * 16 for aval in wide), wide  # factors alone, before they are cast


def test_float32_accumulation_is_kept():
    params = {"w": PARAMS["up"].astype(jnp.bfloat16)}
    frozen, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=2)})

    def fun(params, x):
        return jnp.dot(x, params["w"], preferred_element_type=jnp.float32)

    assert lora.lift(fun)(lora.attach(frozen, lora_params), X.astype(jnp.bfloat16)).dtype == jnp.float32


def test_the_base_ran_first():
    """A warm jit cache changes nothing: factors get their gradients."""
    jitted = jax.jit(model)
    jitted(PARAMS, X)
    grads = jax.grad(lambda lp: loss(lora.lift(jitted))(lora.attach(FROZEN, lp), X))(LORA_PARAMS)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))

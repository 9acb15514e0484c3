"""Dropout of what meets ΔW: what a mask covers, where another one is drawn, and what is expected of the result."""

from __future__ import annotations

import functools

import checks
import jax
import jax.numpy as jnp
import pytest
from checks import equations, error, formed, randomized
from jax import lax

import lora_jax as lora

RATE = 0.25
X = checks.normal(5, 16, seed=1)
Q = checks.normal(16, 12, seed=3)
IMAGES = checks.normal(2, 6, 6, 4, seed=2)


normal = functools.partial(checks.normal, scale=0.3)


def conv(p, _):
    return lax.conv_general_dilated(IMAGES, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def experts(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32))


# name: a function linear in its weight, and the weight
LINEAR = {
    "product": (lambda p, x: x @ p["w"], normal(16, 12, seed=3)),
    "stack": (lambda p, x: jnp.stack([x @ w for w in p["w"]]), normal(3, 16, 12, seed=4)),
    "einsum": (lambda p, x: jnp.einsum("nd,edk->enk", x, p["w"]), normal(3, 16, 12, seed=5)),
    "conv": (conv, normal(3, 3, 4, 8, seed=6)),
    "ragged": (experts, normal(3, 16, 12, seed=7)),
    "two_more_axes": (lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]), normal(16, 4, 3, seed=8)),
}


def adapted(model, params, rate=RATE):
    sites = lora.sites(model, params, X)
    rules = {".*": lora.LoRA(2, alpha=4, dropout=rate)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)
    lora_params = randomized(lora_params, 0.3)

    def run(key, lora_params=lora_params):
        dropped = lora_params if key is None else lora.dropout(key, lora_params)
        return lora.lift(model)(lora.attach(frozen, dropped), X)

    return run, lora_params, frozen


@pytest.mark.parametrize("name", LINEAR)
def test_the_expectation_is_what_it_is_without(name):
    model, weight = LINEAR[name]
    run, lora_params, frozen = adapted(model, {"w": weight})
    n = 3000
    samples = jax.jit(lambda keys: lax.map(run, keys))(jax.random.split(jax.random.key(9), n))
    exact = run(None)
    assert error(exact, model(lora.merge(frozen, lora_params), X)) < 1e-5
    deviation = samples.std(0)
    assert deviation.mean() > 0.01
    # Of independent samples, the mean is off by its standard error, and hardly ever by five times that.
    assert bool((jnp.abs(samples.mean(0) - exact) < 5 * deviation / n**0.5 + 1e-5).all())


def test_inputs_are_dropped_one_by_one_and_the_others_scaled():
    eye = {"w": jnp.zeros((16, 16))}
    run, lora_params, _ = adapted(lambda p, x: x @ p["w"], eye)
    lora_params["w"].factors.update(A=jnp.eye(16, 2), B=jnp.eye(2, 16) / 2)  # the first two inputs, as they are
    y = jax.vmap(lambda key: run(key, lora_params))(jax.random.split(jax.random.key(3), 500))[..., :2]
    kept = y != 0
    assert error(jnp.where(kept, y, 0), jnp.where(kept, X[:, :2] / (1 - RATE), 0)) < 1e-5
    assert 1 - kept.mean() == pytest.approx(RATE, abs=0.02)
    assert bool((kept.any((0, 1)) & ~kept.all((0, 1))).all())


def test_a_key_may_be_of_either_kind():
    run, *_ = adapted(LINEAR["stack"][0], {"w": LINEAR["stack"][1]})
    assert bool((run(jax.random.PRNGKey(3)) == run(jax.random.key(3))).all())


def test_weights_that_are_joined_drop_inputs_each_by_itself():
    """A mask for each of the leaves that a fused weight, or a stack of layers, is made of."""
    run, *_ = adapted(
        lambda p, x: jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["q"]], 1), 3, 1), {"q": Q, "k": 2.0 * Q[:, ::-1]}
    )
    with_q, with_k, again = (a - b for a, b in zip(run(jax.random.key(3)), run(None), strict=True))
    assert error(with_q, again) < 1e-5 < error(with_q, with_k)

    run, *_ = adapted(lambda p, x: x @ jnp.concatenate([p["w"][0], p["w"][1]], 1), {"w": jnp.stack([Q, Q])})
    first, second = jnp.split(run(jax.random.key(3)) - run(None), 2, 1)
    run, *_ = adapted(lambda p, x: jnp.stack([x @ w for w in p["w"]]), {"w": jnp.stack([Q, Q])})
    assert error(jnp.stack([first, second]), run(jax.random.key(3)) - run(None)) < 1e-5


def test_without_a_key_nothing_is_dropped():
    run, lora_params, _ = adapted(lambda p, x: x @ p["w"], {"w": normal(16, 12, seed=3)})
    jaxpr = jax.make_jaxpr(lambda lp: run(None, lp))(lora_params)
    assert not [eqn for eqn in equations(jaxpr) if eqn.primitive.name.startswith("random")]


def test_a_rate_of_zero_draws_no_mask():
    run, lora_params, _ = adapted(lambda p, x: x @ p["w"], {"w": normal(16, 12, seed=3)}, rate=0.0)
    jaxpr = jax.make_jaxpr(lambda key: run(key, lora_params))(jax.random.key(0))
    assert not [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "random_bits"]


def masks(p, x):
    """What each layer of a stack, and each of two leaves, makes of the same input."""
    _, layers = lax.scan(lambda _, w: (None, x @ w), None, p["stack"])
    return {"stack": layers, "one": x @ p["one"], "two": x @ p["two"]}


def test_each_leaf_layer_and_step_has_a_mask_of_its_own():
    eye = jnp.eye(16, 2)
    run, lora_params, _ = adapted(
        masks, {"stack": jnp.zeros((3, 16, 16)), "one": jnp.zeros((16, 16)), "two": jnp.zeros((16, 16))}
    )
    for adapter in lora_params.values():
        a, b = adapter.factors["A"], adapter.factors["B"]
        adapter.factors.update(A=jnp.broadcast_to(eye, a.shape), B=jnp.broadcast_to(eye.T, b.shape))
    found = [jax.tree.map(lambda y: y[..., :2] != 0, run(jax.random.key(seed), lora_params)) for seed in (0, 0, 1)]
    same, again, other = ([*out["stack"], out["one"], out["two"]] for out in found)
    assert all(bool((a == b).all()) for a, b in zip(same, again, strict=True))
    drawn = [
        mask.tobytes()
        for mask in (*map(jnp.asarray, same), *map(jnp.asarray, other))
        for mask in [jax.device_get(mask)]
    ]
    assert len(set(drawn)) == len(drawn) == 10


def test_gradients_are_those_of_the_masked_function():
    """With the mask known, the lifted gradients are those of x·W + s·(x∘m)·A·B written by hand."""
    run, lora_params, frozen = adapted(lambda p, x: jnp.sin(x @ p["w"]), {"w": normal(16, 12, seed=3)})
    key = jax.random.key(4)
    probe = dict(lora_params)
    eye = {"A": jnp.eye(16), "B": jnp.eye(16, 12)}
    identity = lora.Adapter(eye, lora.LoRA(16, dropout=RATE), lora_params["w"].site)
    zero = lora.attach({"w": jnp.zeros((16, 12))}, lora.dropout(key, {"w": identity}))
    mask = (lora.lift(lambda p, x: x @ p["w"])(zero, X) != 0)[:, :12]
    x = X.at[:, 12:].set(0.0)  # the inputs whose mask the probe does not show

    def lifted(lp):
        return jnp.sum(lora.lift(lambda p, x: jnp.sin(x @ p["w"]))(lora.attach(frozen, lora.dropout(key, lp)), x))

    def by_hand(lp):
        a, b = lp["w"].factors["A"], lp["w"].factors["B"]
        dropped = jnp.where(jnp.pad(mask, ((0, 0), (0, 4))), x, 0) / (1 - RATE)
        return jnp.sum(jnp.sin(x @ frozen["w"] + 2 * (dropped @ a) @ b))

    assert error(jax.grad(lifted)(probe), jax.grad(by_hand)(probe)) < 1e-5
    assert formed(jax.make_jaxpr(jax.grad(lifted))(probe), probe) == []


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_a_rate_is_a_probability_below_one(rate):
    with pytest.raises(ValueError, match="probability"):
        lora.LoRA(4, dropout=rate)


def test_embeddings_drop_nothing():
    run, *_ = adapted(lambda p, _: p["w"][jnp.array([1, 2])], {"w": normal(16, 12, seed=3)})
    assert bool((run(jax.random.key(0)) == run(None)).all())


def test_merging_ignores_keys():
    _, lora_params, frozen = adapted(lambda p, x: x @ p["w"], {"w": normal(16, 12, seed=3)})
    merged = lora.merge(frozen, lora.dropout(jax.random.key(0), lora_params))
    assert bool((merged["w"] == lora.merge(frozen, lora_params)["w"]).all())

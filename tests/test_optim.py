"""Only what trains has optimizer state and moves."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import normal
from flax.training.train_state import TrainState

import lora_jax as lora
from lora_jax.tree import nbytes

pytestmark = pytest.mark.standard_promotion

PARAMS = {
    "up": {"kernel": normal(8, 16, seed=1), "bias": jnp.zeros(16)},
    "down": {"kernel": normal(16, 8, seed=2), "bias": jnp.zeros(8)},
}
X = normal(4, 8, seed=3)
RULES = {".*/kernel": lora.LoRA(rank=2), "down/bias": lora.Full()}
FROZEN, LORA_PARAMS = lora.split(jax.random.key(0), PARAMS, RULES)
TRAINED = 4 * (2 * 2 * (8 + 16) + 8)  # bytes: A and B of two kernels, one bias


def loss(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return jnp.mean((h @ params["down"]["kernel"] + params["down"]["bias"] - x) ** 2)


def objective(base, lora_params):
    return lora.lift(loss)(lora.attach(base, lora_params), X)


def moments(state):
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)


@pytest.mark.parametrize(
    "tx", [optax.adamw(1e-2), {"A": optax.adam(1e-2), "B": optax.adam(2e-2), "weight": optax.adam(1e-3)}]
)
def test_state_is_that_of_the_factors(tx):
    assert nbytes(LORA_PARAMS) == TRAINED
    assert moments(lora.optimizer(tx).init(LORA_PARAMS)) == 2 * TRAINED
    assert moments(lora.optimizer(tx).init({"base": FROZEN, "lora": LORA_PARAMS})) == 2 * TRAINED


def test_one_transform_for_each_label():
    tx = lora.optimizer({"A": optax.sgd(0.1), "B": optax.sgd(10.0), "weight": optax.set_to_zero()})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, LORA_PARAMS), tx.init(LORA_PARAMS), LORA_PARAMS)
    assert np.allclose(updates["up/kernel"].factors["A"], -0.1)
    assert np.allclose(updates["up/kernel"].factors["B"], -10.0)
    assert np.allclose(updates["down/bias"].factors["weight"], 0.0)


def test_one_norm_clips_all_factors():
    tx = lora.optimizer(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, LORA_PARAMS), tx.init(LORA_PARAMS), LORA_PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0)


def test_a_combined_tree_trains_as_the_factors_alone_do():
    tx = lora.optimizer(optax.adamw(1e-2, weight_decay=0.1))

    @jax.jit
    def combined_step(tree, state):
        grads = jax.grad(lambda tree: objective(tree["base"], tree["lora"]))(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    @jax.jit
    def step(lora_params, state):
        updates, state = tx.update(jax.grad(lambda lp: objective(FROZEN, lp))(lora_params), state, lora_params)
        return optax.apply_updates(lora_params, updates), state

    tree, lora_params = {"base": FROZEN, "lora": LORA_PARAMS}, LORA_PARAMS
    states = tx.init(tree), tx.init(lora_params)
    for _ in range(5):
        tree, combined_state = combined_step(tree, states[0])
        lora_params, state = step(lora_params, states[1])
        states = combined_state, state
    chex.assert_trees_all_equal(tree["base"], FROZEN)
    chex.assert_trees_all_close(tree["lora"], lora_params, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(lora_params["up/kernel"].factors["B"]).max()) > 0


def test_a_train_state_of_flax():
    state = TrainState.create(
        apply_fn=loss, params={"base": FROZEN, "lora": LORA_PARAMS}, tx=lora.optimizer(optax.adam(1e-2))
    )

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(lambda p: objective(p["base"], p["lora"]))(state.params)
        return state.apply_gradients(grads=grads), value

    state, first = step(state)
    for _ in range(10):
        state, last = step(state)
    assert float(last) < float(first)
    chex.assert_trees_all_equal(state.params["base"], FROZEN)


def test_merged_weights_outlive_a_donated_step():
    lora_params = jax.tree.map(jnp.copy, LORA_PARAMS)
    merged = lora.merge(FROZEN, lora_params)
    jax.jit(lambda lp: jax.tree.map(lambda x: x + 1, lp), donate_argnums=0)(lora_params)
    assert not any(x.is_deleted() for x in jax.tree.leaves(merged))


def test_a_replaced_leaf_may_be_donated():
    """Full's factor is a copy: giving away its buffer leaves the frozen leaf alone."""
    jax.jit(lambda lp: jax.tree.map(lambda x: x + 1, lp), donate_argnums=0)(jax.tree.map(jnp.copy, LORA_PARAMS))
    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, RULES)
    jax.jit(lambda lp: jax.tree.map(lambda x: x + 1, lp), donate_argnums=0)(lora_params)
    assert not frozen["down"]["bias"].is_deleted()
    np.testing.assert_array_equal(frozen["down"]["bias"], PARAMS["down"]["bias"])


def test_what_has_nothing_to_correct_or_to_tell_apart_is_an_error():
    with pytest.raises(ValueError, match="no leaf is under LoRAFA"):
        lora.fa_gradients().init(LORA_PARAMS)
    with pytest.raises(ValueError, match=r"lora_plus\(fast='B'\): fast is a tuple of labels"):
        lora.lora_plus(optax.sgd, 0.1, fast="B")


def test_lora_plus_is_slow_for_factors_of_an_embedding_and_not_for_one_that_trains_itself():
    params, sites = {"a": jnp.ones((8, 4)), "b": jnp.ones((8, 4))}, {}
    for path in params:
        sites[path] = lora.Site((8, 4), "embedding", (), (0,), (1,))
    _, lora_params = lora.split(jax.random.key(0), params, {"a": lora.LoRA(2), "b": lora.Full()}, sites=sites)
    tx = lora.lora_plus(optax.sgd, 0.5, embedding_learning_rate=0.25)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora_params), tx.init(lora_params))
    assert float(updates["a"].factors["B"][0, 0]) == -0.25
    assert float(updates["b"].factors["weight"][0, 0]) == -0.5

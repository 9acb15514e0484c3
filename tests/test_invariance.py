"""Of Adam, only products of alpha, the start of the factors and their learning rates matter."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import error, normal

import lora_jax as lora

pytestmark = pytest.mark.standard_promotion

PARAMS = {"up": normal(12, 20, seed=1, scale=0.3), "down": normal(20, 12, seed=2, scale=0.3)}
X, Y = normal(16, 12, seed=3), normal(16, 12, seed=4)


def loss(params):
    return jnp.mean((jnp.tanh(X @ params["up"]) @ params["down"] - Y) ** 2)


@functools.cache
def trained(p: float, q: float, alpha: float):
    """Losses and merged weights of 20 steps with A's start and rate times p, and B's rate times q."""

    def draw(key, shape, dtype):
        return p * jax.random.normal(key, shape, dtype) / shape[0] ** 0.5

    variant = lora.LoRA(rank=4, alpha=alpha, init=draw)
    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, {".*": variant})
    # A has no gradient while B is zero: epsilon is there for 0/0 alone, and vanishes beside any other number.
    tx = lora.optimizer({"A": optax.adam(p * 1e-2, eps=1e-30), "B": optax.adam(q * 1e-2, eps=1e-30)})

    def step(carry, _):
        lora_params, state = carry
        value, grads = jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(frozen, lp)))(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return (optax.apply_updates(lora_params, updates), state), value

    run = jax.jit(lambda lora_params: jax.lax.scan(step, (lora_params, tx.init(lora_params)), length=20))
    (lora_params, _), losses = run(lora_params)
    return np.asarray(losses), lora.merge(frozen, lora_params)


@pytest.mark.parametrize(("p", "q"), [(4.0, 1.0), (1.0, 8.0), (0.25, 2.0), (3.0, 0.7)])
def test_training_does_not_change_when_all_are_rescaled_together(p, q):
    """Source: Schulman et al. 2025, LoRA Without Regret, https://thinkingmachines.ai/blog/lora/."""
    (losses, weights), (expected, expected_weights) = trained(p, q, 8 / (p * q)), trained(1.0, 1.0, 8.0)
    assert losses[-1] < 0.9 * losses[0]
    assert error(losses, expected) < 1e-5
    assert error(weights, expected_weights) < 1e-5


def test_training_does_change_when_one_is_rescaled_alone():
    (losses, _), (expected, _) = trained(4.0, 1.0, 8.0), trained(1.0, 1.0, 8.0)
    assert error(losses, expected) > 1e-2

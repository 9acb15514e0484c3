"""AdaLoRA's budget, against the paper's formulas in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import error, normal, randomized

import lora_jax as lora
from lora_jax import budget

PARAMS = {"stack": normal(3, 6, 8), "w": normal(6, 5, seed=1)}
ADA = lora.AdaLoRA(rank=4)
RULES = {"stack": ADA.at(batch_axes=0, in_axes=1, out_axes=2), "w": ADA}
FROZEN, LORA_PARAMS = jax.jit(lambda params: lora.split(jax.random.key(0), params, RULES))(PARAMS)
SCHEDULE = budget.Schedule(total_steps=20, target_rank=1, warmup_steps=2, final_steps=5, every=3)


def loss(params, x):
    for layer in params["stack"]:
        x = x + jnp.tanh(x @ layer)[:, :6]
    return jnp.mean((x @ params["w"] - 1) ** 2)


def test_the_budget_is_the_papers():
    for step in range(1, 21):
        left = min(max(1 - (step - 2) / (15 - 2), 0), 1)
        assert int(SCHEDULE.budget(step, 16, 4)) == int(12 * left**3 + 4)


def test_importance_is_sensitivity_times_uncertainty():
    lora_params, state = randomized(LORA_PARAMS), budget.init(LORA_PARAMS)
    gradients = [randomized(LORA_PARAMS, seed=seed) for seed in (1, 2, 3)]
    allocate = jax.jit(functools.partial(budget.allocate, SCHEDULE))
    mean = {name: np.zeros(x.shape) for name, x in lora_params["w"].factors.items()}
    off = {name: np.zeros(x.shape) for name, x in lora_params["w"].factors.items()}
    for grads in gradients:
        for name in mean:
            now = np.abs(np.asarray(lora_params["w"].factors[name]) * np.asarray(grads["w"].factors[name]))
            mean[name] = 0.85 * mean[name] + 0.15 * now
            off[name] = 0.85 * off[name] + 0.15 * np.abs(now - mean[name])
        _, state = allocate(state, lora_params, grads)
    assert error(state.sensitivity["w"], mean) < 1e-6
    assert error(state.uncertainty["w"], off) < 1e-6
    # Step 3 was the first to prune: of 16 entries the 13 of the highest scores are left.
    score = mean["E"] * off["E"] + (mean["A"] * off["A"]).mean(0) + (mean["B"] * off["B"]).mean(1)
    kept = {path: np.asarray(x) for path, x in state.kept.items()}
    assert sum(x.sum() for x in kept.values()) == int(SCHEDULE.budget(3, 16, 4)) == 13
    assert score[kept["w"]].min() > score[~kept["w"]].max(initial=0)


@pytest.mark.standard_promotion
def test_training_ends_with_the_budget_that_was_set():
    x, tx, traces = normal(7, 6, seed=5), lora.optimizer(optax.adam(0.05)), []

    @jax.jit
    def step(lora_params, state, importance):
        traces.append(1)

        def objective(lora_params):
            fit = lora.lift(loss)(lora.attach(FROZEN, lora_params), x)
            return fit + 0.1 * budget.orthogonality(lora_params)

        value, grads = jax.value_and_grad(objective)(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        lora_params = optax.apply_updates(lora_params, updates)
        return *budget.allocate(SCHEDULE, importance, lora_params, grads)[::-1], state, value

    lora_params, state, importance = LORA_PARAMS, tx.init(LORA_PARAMS), budget.init(LORA_PARAMS)
    losses, left = [], []
    for _ in range(20):
        importance, lora_params, state, value = step(lora_params, state, importance)
        losses.append(float(value))
        left.append(sum(int((adapter.factors["E"] != 0).sum()) for adapter in lora_params.values()))
    assert len(traces) == 1
    assert losses[-1] < losses[0]
    assert left[:2] == [16, 16]  # warm-up
    assert [left[i] for i in (2, 5, 8, 11)] == [int(SCHEDULE.budget(i + 1, 16, 4)) for i in (2, 5, 8, 11)]
    assert left[14:] == [4] * 6  # one for each of three layers and w on the average, and they stay the same ones
    restored = lora.unmerge(lora.merge(FROZEN, lora_params), lora_params)
    assert error(restored, FROZEN) < 1e-6


def test_orthogonality_is_the_mean_distance_from_orthonormal():
    f = {path: {n: np.asarray(x) for n, x in a.factors.items()} for path, a in randomized(LORA_PARAMS).items()}
    grams = [f["w"]["A"].T @ f["w"]["A"], f["w"]["B"] @ f["w"]["B"].T]
    grams += [a.T @ a for a in f["stack"]["A"]] + [b @ b.T for b in f["stack"]["B"]]
    expected = np.mean([np.linalg.norm(gram - np.eye(4)) for gram in grams])
    assert float(budget.orthogonality(randomized(LORA_PARAMS))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("use", [budget.init, budget.orthogonality])
def test_without_adalora_there_is_nothing_to_do(use):
    with pytest.raises(ValueError, match="no leaf is under AdaLoRA"):
        use(lora.split(jax.random.key(0), PARAMS, {"w": lora.LoRA(rank=2)})[1])


def test_a_target_that_prunes_nothing():
    with pytest.raises(ValueError, match="target_rank 8 is above the 16 entries of E that 4 matrices have"):
        budget.allocate(budget.Schedule(20), budget.init(LORA_PARAMS), LORA_PARAMS, LORA_PARAMS)


@pytest.mark.parametrize("fields", [{"final_steps": 20}, {"warmup_steps": -1}, {"beta1": 1.0}, {"every": 0}])
def test_a_schedule_that_makes_no_sense(fields):
    with pytest.raises(ValueError, match="leave none of 20|a whole number, [01] or more|it is between 0 and 1"):
        functools.partial(budget.Schedule, 20, **fields)()

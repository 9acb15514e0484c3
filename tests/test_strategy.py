"""How products are made: FLOPs and bytes of each strategy, against closed forms and a layer written by hand."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from checks import error, flops, randomized

import lora_jax as lora

D, RANK, LAYERS, SCALE = 256, 8, 3, 2.0
PARAMS = {str(i): jax.random.normal(jax.random.key(i), (D, D)) * D**-0.5 for i in range(LAYERS)}


def model(product):
    def loss(params, x):
        for p in params.values():
            x = jnp.tanh(product(x, p))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return loss


def adapted(dtype="float32"):
    params = {name: p.astype(dtype) for name, p in PARAMS.items()}
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(RANK, alpha=SCALE * RANK)})
    return frozen, randomized(lora_params)


def step(strategy="factored"):
    loss = lora.lift(model(jnp.matmul), strategy=strategy)
    return jax.value_and_grad(lambda lp, x, frozen: loss(lora.attach(frozen, lp), x), (0, 1))


@jax.custom_vjp
def by_hand(x, w, a, b):
    return x @ w + (x @ a) @ b


def _forward(x, w, a, b):
    u = x @ a
    return x @ w + u @ b, (x, u, w, a, b)


def _backward(saved, dy):
    x, u, w, a, b = saved
    du = dy @ b.T
    return dy @ w.T + du @ a.T, None, (du.T @ x).T, u.T @ dy


by_hand.defvjp(_forward, _backward)


def step_by_hand():
    """The same step with a derivative written for the shapes it has, on activations of two dimensions."""

    def product(x, p):
        w, a, b = p
        y = by_hand(x.reshape(-1, D), w, a.astype(x.dtype), (SCALE * b).astype(x.dtype))
        return y.reshape(x.shape)

    def loss(lora_params, x, frozen):
        factors = ((w, *lora_params[name].factors.values()) for name, w in frozen.items())
        return model(product)(dict(zip(frozen, factors, strict=True)), x)

    return jax.value_and_grad(loss, (0, 1))


def closed_form(n, strategy):
    per_layer = {"factored": 6 * n * RANK * 2 * D, "hybrid": 4 * n * RANK * 2 * D + 2 * D * RANK * D}
    return LAYERS * (4 * n * D * D + per_layer[strategy])


@pytest.mark.parametrize("strategy", ["factored", "hybrid"])
def test_each_strategy_costs_its_closed_form(strategy):
    frozen, lora_params = adapted()
    x = jnp.ones((8, 128, D))
    assert flops(step(strategy), lora_params, x, frozen) == pytest.approx(closed_form(1024, strategy), rel=0.01)


def test_the_hybrid_is_taken_only_where_it_is_cheaper():
    """Where n < dk/(d + k), here 128, it would cost more."""
    frozen, lora_params = adapted()
    few, many = jnp.ones((64, D)), jnp.ones((512, D))
    assert flops(step("hybrid"), lora_params, few, frozen) == flops(step("factored"), lora_params, few, frozen)
    assert flops(step("hybrid"), lora_params, many, frozen) < flops(step("factored"), lora_params, many, frozen)
    found = lora.explain(model(jnp.matmul), strategy="hybrid")(lora.attach(frozen, lora_params), many)
    assert {row.use.cost.order for row in found.rows} == {"x·(W + ΔW)"}


def test_strategies_differ_in_rounding_alone():
    frozen, lora_params = adapted()
    x = jax.random.normal(jax.random.key(5), (4, 64, D))
    assert error(step("hybrid")(lora_params, x, frozen), step("factored")(lora_params, x, frozen)) < 1e-5
    both = jax.jit(jax.vmap(step("hybrid"), (None, 0, None)))(lora_params, x, frozen)
    assert error(both, jax.vmap(step("factored"), (None, 0, None))(lora_params, x, frozen)) < 1e-5


@pytest.mark.parametrize("shape", [(1024, D), (8, 128, D), (1, D)])
def test_the_step_costs_what_a_layer_written_by_hand_costs(shape):
    frozen, lora_params = adapted()
    x = jax.random.normal(jax.random.key(5), shape)
    arguments = (lora_params, x, frozen)
    ours, theirs = (jax.jit(f).lower(*arguments).compile() for f in (step(), step_by_hand()))
    assert error(ours(*arguments), theirs(*arguments)) < 1e-5
    for figure in ("flops", "bytes accessed"):
        assert ours.cost_analysis()[figure] <= 1.02 * theirs.cost_analysis()[figure], figure
    held = [compiled.memory_analysis().temp_size_in_bytes for compiled in (ours, theirs)]
    scaled = sum(leaf.factors["B"].nbytes for leaf in lora_params.values())  # XLA says how many live at once
    assert held[0] <= 1.02 * held[1] + scaled


def test_bfloat16_has_no_float32_array_of_activation_size_that_the_base_model_has_not():
    """Factors are float32 and the base is bfloat16: the factors are cast, which are small."""
    frozen, lora_params = adapted("bfloat16")
    x = jnp.ones((512, D), jnp.bfloat16)

    def large(fun, *args):
        text = jax.jit(fun).lower(*args).as_text()
        return len(re.findall(rf"-> tensor<512x{D}xf32>", text))

    assert large(step(), lora_params, x, frozen) <= large(jax.value_and_grad(model(jnp.matmul), (0, 1)), frozen, x)


def test_an_unknown_strategy_is_an_error():
    with pytest.raises(ValueError, match="strategy='fast': it is 'factored', 'hybrid', or a function"):
        lora.lift(model(jnp.matmul), strategy="fast")

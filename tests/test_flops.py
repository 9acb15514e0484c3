"""FLOPs as XLA counts them, against the closed form: 4ndk + 6nr(d + k) for a linear layer, and what is not adapted."""

from __future__ import annotations

import functools
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from checks import all_adaptable, flops, normal
from zoo import WIDE, ZOO

import lora_jax as lora

pytestmark = pytest.mark.standard_promotion

N, D, LAYERS, RANK = (4, 128), 256, 4, 8
TOKENS = N[0] * N[1]


def chain():
    """Matrices and nothing else, whose closed form is exact; the first needs no gradient of its input."""
    params = [normal(D, D, seed=i, scale=D**-0.5) for i in range(LAYERS)]

    def loss(params, x):
        for kernel in params:
            x = x @ kernel
        return jnp.mean(x**2)

    frozen, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(RANK)})
    expected = LAYERS * (4 * TOKENS * D * D + 6 * TOKENS * RANK * 2 * D) - 2 * TOKENS * D * D - 2 * TOKENS * RANK * D
    return loss, frozen, lora_params, jnp.ones((*N, D)), expected


def cost_of_step(objective, params, *rest):
    """The FLOPs of a whole training step."""
    tx = lora.optimizer(optax.sgd(1e-3))

    def step(params, state, *rest):
        value, grads = jax.value_and_grad(objective)(params, *rest)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return flops(step, params, tx.init(params), *rest)


def test_a_chain_of_matrices_costs_the_closed_form():
    loss, frozen, lora_params, x, expected = chain()
    found = cost_of_step(lambda lp, frozen, x: lora.lift(loss)(lora.attach(frozen, lp), x), lora_params, frozen, x)
    assert found == pytest.approx(expected, rel=0.01)


def test_a_combined_tree_has_no_gradient_of_the_base():
    loss, frozen, lora_params, x, expected = chain()
    combined = {"base": frozen, "lora": lora_params}
    found = cost_of_step(lambda t, x: lora.lift(loss)(lora.attach(t["base"], t["lora"]), x), combined, x)
    assert found == pytest.approx(expected, rel=0.01)
    # The same gradients, but returned: one product more for each layer.
    kept = flops(jax.grad(lambda t, x: lora.lift(loss)(lora.attach(t["base"], t["lora"]), x)), combined, x)
    assert kept - found == pytest.approx(LAYERS * 2 * TOKENS * D * D, rel=0.02)


class Encoder(nn.Module):
    """Attention and an MLP, three times, every linear layer with a bias."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            q, k, v = (nn.DenseGeneral((4, D // 4))(x) for _ in range(3))
            x = x + nn.DenseGeneral(D, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v))
            x = x + nn.Dense(D)(nn.relu(nn.Dense(2 * D)(x)))
        return x


def test_a_transformer_costs_the_closed_form_and_what_is_not_adapted():
    model = Encoder()
    x = jnp.ones((*N, D))
    params = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.mean(model.apply(params, x) ** 2)

    def cost(variant):
        sites = lora.sites(loss, params, x)
        rules = {".*/bias": lora.Full()} if variant is None else all_adaptable(variant)
        split = functools.partial(lora.split, rules=rules, sites=sites)
        frozen, lora_params = jax.eval_shape(split, jax.random.key(0), params)
        step = jax.grad(lambda lp, frozen, x: lora.lift(loss)(lora.attach(frozen, lp), x))
        return flops(step, lora_params, frozen, x)

    # Training the biases alone needs every activation and every activation's gradient, and no product more.
    not_adapted = cost(None)
    per_rank = 6 * TOKENS * 3 * (4 * 2 * D + 2 * 3 * D) - 3 * 2 * TOKENS * D  # no x-gradient in the first q, k and v
    for rank in (8, 32):
        adapted = cost(lora.LoRA(rank))
        assert adapted == pytest.approx(not_adapted + rank * per_rank, rel=0.01)
        assert adapted - not_adapted == pytest.approx(rank * per_rank, rel=0.05)


@pytest.mark.parametrize("model", ZOO)
def test_every_model_costs_what_its_full_step_does_less_the_weights_gradients_plus_the_factors(model):
    """4ndk + 6nr(d + k) for each use of each adapted leaf, and what else the model does."""
    loss, params, batch = ZOO[model](WIDE)
    sites = lora.sites(loss, params, *batch)
    tokens = math.prod(WIDE.batch)

    def cost(variant):
        split = functools.partial(lora.split, rules=all_adaptable(variant), sites=sites)
        _, lora_params = eqx.filter_eval_shape(split, jax.random.key(0), params)
        step = jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(params, lp), *batch))
        return flops(step, lora_params)

    gradients, per_rank = 0, 0
    for site in sites.values():
        if site.adaptable:
            _, inner, outer = site.sizes()
            d, k = math.prod(inner), math.prod(outer)
            stacked = site.batch_axes and len(site.uses) == 1  # one use in the body of a loop over layers
            for use in site.uses * (site.shape[0] if stacked else 1):
                looked_up = use.kind == "embedding"  # dW is a scatter, and A's rows are picked
                gradients += 0 if looked_up else 2 * tokens * d * k
                per_rank += 6 * tokens * (k if looked_up else d + k)
    full = cost(lora.Full())
    assert cost(lora.LoRA(rank=8)) == pytest.approx(full - gradients + 8 * per_rank, rel=0.01)

"""What each variant's step costs: the closed form of its docstring, and no more than its share of LoRA's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from checks import flops

import lora_jax as lora

N, D, K, R = 512, 256, 384, 16  # tokens, inputs, outputs, rank


def lora_like(n, d, k, r):
    return 6 * n * r * (d + k)


# variant, and the FLOPs of a step beyond the base's 4ndk at a kernel (d, k)
COSTS = {
    "LoRA": (lora.LoRA(R), lora_like),
    "DoRA": (
        lora.DoRA(R, alpha=8),
        lambda n, d, k, r: lora_like(n, d, k, r) + 2 * d * r * k + 2 * d * k + 2 * r * r * (d + k) + 4 * n * k,
    ),
    "IA3": (lora.IA3(), lambda n, d, k, r: 4 * n * k),
    "IA3_in": (lora.IA3(side="in"), lambda n, d, k, r: 4 * n * d),
    "VeRA": (lora.VeRA(R), lambda n, d, k, r: 4 * n * r * (d + k) + 4 * n * r + 4 * n * k),
    "LoHa": (lora.LoHa(6), lambda n, d, k, r: lora_like(n, d, k, 36) + 5 * 36 * (d + k)),
    "LoKr": (lora.LoKr(R // 4), lambda n, d, k, r: lora_like(n, d, k, r // 4) + 6 * n * r // 4 * 16 * 16),
    "LoKr_whole": (lora.LoKr(R), lambda n, d, k, r: 6 * n * 16 * 16 * (16 + 24)),
    "AdaLoRA": (lora.AdaLoRA(R), lambda n, d, k, r: lora_like(n, d, k, r) + 4 * n * r),
    "LoRAFA": (lora.LoRAFA(R), lambda n, d, k, r: 4 * n * r * d + 6 * n * r * k),
    "LoRAXS": (lora.LoRAXS(R), lambda n, d, k, r: 4 * n * r * (d + k) + 6 * n * r * r),
}


@functools.cache
def cost(variant, shape=(D, K), tokens=N):
    """The FLOPs of a layer's output, and of the gradients by its factors and its input."""
    split = functools.partial(lora.split, rules={"w": variant})
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    frozen, lora_params = jax.eval_shape(split, jax.random.key(0), {"w": weight})
    layer = lora.lift(lambda params, x: x @ params["w"])

    def step(lora_params, x, frozen, dy):
        y, backward = jax.vjp(lambda lora_params, x: layer(lora.attach(frozen, lora_params), x), lora_params, x)
        return y, backward(dy)

    return flops(step, lora_params, jnp.ones((tokens, shape[0])), frozen, jnp.ones((tokens, shape[1])))


@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_the_closed_form(name):
    variant, form = COSTS[name]
    base, beyond = 4 * N * D * K, form(N, D, K, R)
    assert cost(variant) == pytest.approx(base + beyond, rel=0.01)
    assert cost(variant) - base == pytest.approx(beyond, rel=0.05)


GPT2 = (768, 2304), (768, 768), (768, 3072), (3072, 768)


@pytest.mark.parametrize(
    ("variant", "limit"), [(lora.DoRA(16), 1.05), (lora.LoHa(8), 1.25), (lora.LoKr(8), 1.10), (lora.LoKr(64), 1.10)]
)
def test_a_step_of_gpt2_costs_little_more_than_with_lora_of_rank_16(variant, limit):
    """512 tokens, each kernel of a block; DoRA's norms are of one use of each."""
    assert sum(cost(variant, s) for s in GPT2) <= limit * sum(cost(lora.LoRA(16), s) for s in GPT2)

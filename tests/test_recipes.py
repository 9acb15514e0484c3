"""Recipes: the same values and gradients as without them, and less to hold."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import equations, error, flops, normal, randomized
from in_numpy import in_numpy

import lora_jax as lora
from lora_jax.recipes import accumulated, cross_entropy, save_products

B, T, D, V = 3, 50, 16, 301
KEYS = jax.random.split(jax.random.key(0), 4)
X, HEAD = normal(B, T, D, seed=1), normal(D, V, seed=2)
LABELS = jax.device_put(np.random.default_rng(3).integers(V, size=(B, T), dtype=np.int32))
MASK = jax.device_put(np.random.default_rng(4).random((B, T)) < 0.7)


def plainly(x, head, mask=MASK):
    logits = jax.nn.log_softmax((x @ head).astype(jnp.float32))
    right = jnp.take_along_axis(logits, LABELS[..., None], -1)[..., 0]
    mask = mask.astype(jnp.float32)
    return -(right * mask).sum() / mask.sum()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [1, 32, 75, 1000])
def test_cross_entropy_is_what_it_is_without_chunks(chunk, recompute):
    def chunked(x, head):
        return cross_entropy(x, head, LABELS, MASK, chunk=chunk, recompute=recompute)

    value, (of_x, of_head) = in_numpy(jax.value_and_grad(plainly, (0, 1)))(X, HEAD)
    assert error(jax.value_and_grad(chunked, (0, 1))(X, HEAD), (value, (of_x, of_head))) < 1e-5
    assert error(jax.jit(jax.grad(lambda x: 3 * chunked(x, HEAD)))(X), 3 * of_x) < 1e-5
    assert error(chunked(X, HEAD), value) < 1e-6


def test_cross_entropy_without_a_mask_and_with_one_that_counts_nothing():
    assert error(cross_entropy(X, HEAD, LABELS), plainly(X, HEAD, jnp.ones((B, T)))) < 1e-6
    value, of_x = jax.value_and_grad(lambda x: cross_entropy(x, HEAD, LABELS, jnp.zeros((B, T))))(X)
    assert value == 0
    assert not of_x.any()


def test_cross_entropy_in_bfloat16_keeps_float32_logits():
    x, head = X.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    step = jax.value_and_grad(lambda x, head: cross_entropy(x, head, LABELS, MASK, chunk=32), (0, 1))
    value, grads = step(x, head)
    assert (value.dtype, grads[0].dtype, grads[1].dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    exact, of_exact = jax.value_and_grad(plainly, (0, 1))(x.astype(jnp.float32), head.astype(jnp.float32))
    assert error(value, exact) < 1e-4
    assert error(grads, of_exact) < 0.02
    products = [eqn for eqn in equations(jax.make_jaxpr(step)(x, head)) if eqn.primitive.name == "dot_general"]
    # Of mixed dtypes, XLA would make a head in float32.
    assert {v.aval.dtype for eqn in products for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(("argnums", "products"), [((), 2), ((0,), 4), ((0, 1), 6)])
def test_cross_entropy_makes_no_product_twice_and_holds_no_logits(argnums, products):
    """2ndV FLOPs for the value and for each gradient; XLA counts the one body of the loop."""
    chunk, d, v = 64, 128, 512
    x, head, labels = jnp.ones((256, d)), jnp.ones((d, v)), jnp.zeros(256, int)

    def loss(x, head):
        return cross_entropy(x, head, labels, chunk=chunk)

    step = jax.grad(loss, argnums) if argnums else loss
    assert flops(step, x, head) == pytest.approx(products * chunk * d * v, rel=0.1)
    shapes = [v.aval.shape for eqn in equations(jax.make_jaxpr(step)(x, head)) for v in eqn.outvars]
    assert max(math.prod(shape) for shape in shapes if v in shape) == (d if 1 in argnums else chunk) * v


@pytest.mark.parametrize("recompute", [False, True])
def test_cross_entropy_in_a_lifted_function(recompute):
    params = {"w": jax.random.normal(KEYS[3], (D, D)), "embed": HEAD.T}
    rules = {"w": lora.LoRA(2)} | ({"embed": lora.LoRA(2)} if recompute else {})
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    lora_params = randomized(lora_params)

    def model(params, x):
        return cross_entropy(jnp.tanh(x @ params["w"]), params["embed"].T, LABELS, chunk=32, recompute=recompute)

    found = jax.jit(jax.value_and_grad(lambda lp: lora.lift(model)(lora.attach(frozen, lp), X)))(lora_params)
    assert error(found, in_numpy(jax.value_and_grad(lambda lp: model(lora.merge(frozen, lp), X)))(lora_params)) < 1e-5


def test_cross_entropy_refuses_what_it_would_lose():
    with pytest.raises(ValueError, match="the mask depends on what is differentiated"):
        jax.grad(lambda scale: cross_entropy(X, HEAD, LABELS, scale * MASK.astype(jnp.float32)))(2.0)
    with pytest.raises(ValueError, match=r"labels \(150,\) do not fit"):
        cross_entropy(X, HEAD, LABELS.ravel())
    frozen, lora_params = lora.split(jax.random.key(0), {"head": HEAD}, {"head": lora.LoRA(2)})
    with pytest.raises(lora.MaterializeError, match="'head'.*'custom_vjp_call'"):
        lora.lift(lambda p: cross_entropy(X, p["head"], LABELS))(lora.attach(frozen, lora_params))


@pytest.mark.parametrize("parts", [1, 4, 12])
def test_parts_of_a_batch_add_up_to_it(parts):
    batch = {"x": jax.random.normal(KEYS[0], (12, D)), "y": jnp.arange(12.0)}

    def loss(w, batch, power):
        return jnp.mean(jnp.abs(batch["x"] @ w - batch["y"]) ** power), {"y": batch["y"].mean()}

    step = jax.value_and_grad(loss, has_aux=True)
    found, expected = (f(HEAD[:, 0], batch, 2) for f in (jax.jit(accumulated(step, parts), static_argnums=2), step))
    assert error(found, expected) < 1e-6


def test_a_batch_that_does_not_divide_is_an_error():
    step = accumulated(jax.value_and_grad(lambda w, batch: jnp.sum(w * batch["x"])), 4)
    with pytest.raises(ValueError, match=r"'x' of the batch has shape \(6,\), which 4 parts do not divide"):
        step(1.0, {"x": jnp.ones(6)})
    with pytest.raises(ValueError, match="0 parts"):
        accumulated(step, 0)


def test_a_sharded_batch_stays_where_it_is():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.device_put(jnp.ones((32, D)), jax.NamedSharding(mesh, jax.P("data")))
    step = accumulated(jax.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x @ w))), 4)
    text = jax.jit(step).lower(HEAD, batch).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_an_adapted_block_under_save_products_makes_no_product_twice():
    d, n, depth = 256, 512, 4
    stack = {
        "up": 0.05 * jax.random.normal(KEYS[0], (depth, d, 2 * d)),
        "gate": 0.05 * jax.random.normal(KEYS[1], (depth, d, 2 * d)),
        "down": 0.05 * jax.random.normal(KEYS[2], (depth, 2 * d, d)),
    }
    x = jax.random.normal(KEYS[3], (n, d))

    def block(x, p):
        h = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    def step(policy, unroll=1):
        def model(params, x):
            return jnp.mean(jax.lax.scan(policy(block), x, params, unroll=unroll)[0] ** 2)

        return jax.value_and_grad(lambda lp: lora.lift(model)(lora.attach(frozen, lp), x))

    sites = lora.sites(lambda p, x: jax.lax.scan(block, x, p)[0], stack, x)
    frozen, lora_params = lora.split(
        jax.random.key(0), stack, {"gate|up": lora.LoRA(8), "down": lora.LoRA(4)}, sites=sites
    )
    lora_params = randomized(lora_params)
    policies = {
        "kept": lambda block: block,
        "products": lambda block: jax.checkpoint(block, policy=save_products),
        "recomputed": jax.checkpoint,
    }
    cost = {name: flops(step(policy, unroll=depth), lora_params) for name, policy in policies.items()}
    compiled = {name: jax.jit(step(policy)).lower(lora_params).compile() for name, policy in policies.items()}
    held = {name: program.memory_analysis().temp_size_in_bytes for name, program in compiled.items()}
    assert cost["products"] <= 1.02 * cost["kept"] < 1.2 * cost["kept"] < cost["recomputed"]
    assert held["recomputed"] < held["products"] < held["kept"]
    results = [program(lora_params) for program in compiled.values()]
    assert max(error(found, results[0]) for found in results[1:]) < 1e-5

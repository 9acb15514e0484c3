"""What goes wrong in other LoRA libraries for JAX, each a test here; docstrings say in a line what goes wrong there."""

from __future__ import annotations

import functools
import math

import checks
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import all_adaptable, equations, error, formed, randomized
from flax import nnx
from in_numpy import in_numpy
from jax import lax

import lora_jax as lora

KEY = jax.random.key(0)


normal = functools.partial(checks.normal, scale=0.5)


def conv(x, w, *, strides, padding, layout):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout)


def oihw(w, x):
    return conv(x, w, strides=(1, 1), padding="SAME", layout=("NCHW", "OIHW", "NCHW"))


def strided(w, x):
    return conv(x, w, strides=(2, 2), padding="SAME", layout=("NHWC", "HWIO", "NHWC"))


def strided_oihw(w, x):
    return conv(x, w, strides=(2, 2), padding=((1, 0), (2, 1)), layout=("NCHW", "OIHW", "NCHW"))


def stack(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


GROUPS = jnp.array([3, 0, 2, 1, 0])
X = normal(6, 8, seed=9)
# name: function of (weight, x), weight, x. Comments say what becomes of such a weight elsewhere.
KINDS = {
    "matmul": (lambda w, x: x @ w, normal(8, 5), X),
    # Only dot_general is traced through, or only jnp.dot is patched.
    "lax_dot": (lambda w, x: lax.dot(x, w), normal(8, 5), X),
    # A weight is taken to be the right operand.
    "left": (lambda w, x: w @ x, normal(5, 6), X),
    # Loops are not entered, so their weights are merged or left out; or only a framework's own scan is known.
    "stack": (stack, normal(3, 8, 8), X),
    # Layers' kernels with more than two dimensions stay frozen, without a word.
    "heads_out": (lambda w, x: jnp.einsum("td,dhk->thk", x, w), normal(8, 2, 4), X),
    "heads_in": (lambda w, x: jnp.einsum("thk,hkd->td", x.reshape(6, 2, 4), w), normal(2, 4, 5), X),
    # Experts share one B, or get no factors.
    "experts": (lambda w, x: jnp.einsum("etd,edf->etf", x.reshape(3, 2, 8), w), normal(3, 8, 5), X),
    "ragged_dot": (lambda w, x: lax.ragged_dot(x, w, GROUPS), normal(5, 8, 5), X),
    # Kernels are taken to be HWIO, strides to be 1.
    "conv_oihw": (oihw, normal(6, 4, 3, 3), normal(2, 4, 8, 8)),
    "conv_strided": (strided, normal(3, 3, 4, 6), normal(2, 9, 8, 4)),
    "conv_strided_oihw": (strided_oihw, normal(6, 4, 3, 2), normal(2, 4, 9, 8)),
    "embedding": (lambda w, x: w[jnp.arange(6) % 4] * x, normal(11, 8), X),
    # The head keeps the base's table while the embedding is adapted.
    "tied": (lambda w, x: (w[jnp.arange(6)] + x) @ w.T, normal(11, 8), X),
}


def split(model, params, *args, alpha=4.0, rules=None):
    rules = rules or all_adaptable(lora.LoRA(rank=2, alpha=alpha))
    return lora.split(KEY, params, rules, sites=lora.sites(model, params, *args))


@functools.cache
def adapted(name, alpha=4.0):
    """A kind's step, lifted and merged, from factors to (gradients, values); and its factors, initial and random."""
    fun, weight, x = KINDS[name]

    def model(params):
        return jnp.sin(fun(params["w"], x))

    frozen, lora_params = split(model, {"w": weight}, alpha=alpha)
    lifted = step(lambda lp: lora.lift(model)(lora.attach(frozen, lp)))
    merged = step(lambda lp: model(lora.merge(frozen, lp)), in_numpy)
    return lifted, merged, lora_params, randomized(lora_params, 0.3)


def step(fun, run=jax.jit):
    def total(lora_params):
        y = fun(lora_params)
        return y.sum(), y

    return run(jax.grad(total, has_aux=True))


def with_b(lora_params, change):
    """The same factors but for B."""
    (path, adapter) = next(iter(lora_params.items()))
    factors = adapter.factors | {"B": change(adapter.factors["B"])}
    return {path: lora.Adapter(factors, adapter.variant, adapter.site)}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_adapted(name):
    """A library that knows layers, or names, or some primitives, leaves other weights as they are, without a word."""
    lifted, merged, _, lora_params = adapted(name)
    grads, y = lifted(lora_params)
    assert error((grads, y), merged(lora_params)) < 1e-5
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", KINDS)
def test_nothing_changes_at_initialization(name):
    """A library that draws both A and B starts somewhere else; one that makes both zero never starts."""
    lifted, merged, lora_params, _ = adapted(name)
    factors = lora_params["w"].factors
    assert factors["A"].any()
    assert not factors["B"].any()
    weight = KINDS[name][1]
    np.testing.assert_array_equal(lora.merge({"w": weight}, lora_params)["w"], weight)
    grads, y = lifted(lora_params)
    assert error(y, merged(lora_params)[1]) < 1e-6
    assert grads["w"].factors["B"].any()


@pytest.mark.parametrize("name", KINDS)
def test_no_gradient_is_as_large_as_the_weight(name):
    """A library that differentiates the whole tree, or writes zeros for W's gradient, pays for an array of W's size."""
    lifted, _, _, lora_params = adapted(name)
    jaxpr, (grads, _) = jax.make_jaxpr(lifted, return_shape=True)(lora_params)
    assert jax.tree.structure(grads) == jax.tree.structure(lora_params)
    filled = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "broadcast_in_dim"]
    assert [eqn for eqn in filled if eqn.outvars[0].aval.shape == lora_params["w"].site.shape] == []
    assert formed(jaxpr, lora_params) == []


@pytest.mark.parametrize("name", KINDS)
def test_alpha_counts(name):
    """A library that drops alpha on the way to some layers trains those at another scale."""
    lifted, _, _, lora_params = adapted(name)
    at_twice_the_alpha, _, _, same_factors = adapted(name, alpha=8.0)
    y = at_twice_the_alpha(same_factors)[1]
    assert error(y, lifted(with_b(lora_params, lambda b: 2.0 * b))[1]) < 1e-5
    assert error(y, lifted(lora_params)[1]) > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_stays(name):
    """A library that keeps factors in float32 and multiplies with them as they are returns float32 logits."""
    fun, weight, x = KINDS[name]

    def model(params, x):
        return fun(params["w"], x)

    weight, x = weight.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    frozen, lora_params = split(model, {"w": weight}, x)
    jaxpr = jax.make_jaxpr(lora.lift(model))(lora.attach(frozen, lora_params), x)
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    products = ("dot_general", "ragged_dot_general", "conv_general_dilated", "add")
    wide = [eqn for eqn in equations(jaxpr) if eqn.primitive.name in products]
    assert [eqn for eqn in wide if eqn.outvars[0].aval.dtype == jnp.float32] == []


@pytest.mark.parametrize("name", KINDS)
def test_merging_is_pure(name):
    """A library that merges in place, or has no way back to plain weights, cannot serve what it trained."""
    fun, weight, x = KINDS[name]
    before = np.array(weight)
    frozen, lora_params = split(lambda params: fun(params["w"], x), {"w": weight})
    lora_params = randomized(lora_params, 0.3)
    merged = lora.merge(frozen, lora_params)["w"]
    assert (merged.shape, merged.dtype) == (weight.shape, weight.dtype)
    assert error(merged, weight) > 1e-2
    np.testing.assert_array_equal(frozen["w"], before)
    assert error(lora.unmerge({"w": merged}, lora_params)["w"], weight) < 1e-6


@pytest.mark.parametrize("name", ["experts", "ragged_dot"])
def test_each_expert_has_factors_of_its_own(name):
    """A library that gives experts one B in common trains each on the others' tokens."""
    lifted, _, _, lora_params = adapted(name)
    factors, tokens = lora_params["w"].factors, {"experts": (2, 2, 2), "ragged_dot": GROUPS.tolist()}[name]
    assert (factors["A"].shape, factors["B"].shape) == ((len(tokens), 8, 2), (len(tokens), 2, 5))
    grads, y = lifted(lora_params)
    rows = [g for g, n in zip(grads["w"].factors["B"], tokens, strict=True) if n]
    assert all(bool(g.any()) == (n > 0) for g, n in zip(grads["w"].factors["B"], tokens, strict=True))
    assert len({tuple(row.ravel().tolist()) for row in rows}) == len(rows)
    moved = lifted(with_b(lora_params, lambda b: b.at[0].add(1.0)))[1]
    changed = jnp.any(moved != y, axis=-1).ravel()
    assert changed.tolist() == [i < tokens[0] for i in range(6)]


class OddNames(nn.Module):
    """Variables that are called neither kernel nor weight."""

    @nn.compact
    def __call__(self, x):
        theta = self.param("theta", nn.initializers.normal(), (8, 8))
        return nn.Dense(5, name="of_no_importance")(jnp.tanh(x @ theta))


class OddAttributes(nnx.Module):
    def __init__(self):
        self.phi = nnx.Param(normal(8, 8))
        self.each = nnx.List([nnx.Param(normal(8, 5, seed=1))])

    def __call__(self, x):
        return jnp.tanh(x @ self.phi[...]) @ self.each[0][...]


def linen_model():
    model = OddNames()
    return model.apply, model.init(KEY, X), {"params/theta", "params/of_no_importance/kernel"}


def nnx_model():
    graph, params = nnx.split(OddAttributes())
    return lambda params, x: nnx.merge(graph, params)(x), params, {"phi", "each/0"}


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_the_base_ran_first_and_names_are_any(make):
    """A library that patches modules as they are traced trains nothing once jit has cached the base's trace; one that
    looks for "kernel" misses the rest."""
    apply, params, paths = make()
    jitted = jax.jit(apply)
    base = jitted(params, X)
    frozen, lora_params = split(apply, params, X)
    assert {path.removesuffix("/value") for path in lora_params} == paths
    lora_params = randomized(lora_params, 0.3)
    grads, y = step(lambda lp: lora.lift(jitted)(lora.attach(frozen, lp), X))(lora_params)
    assert error((grads, y), step(lambda lp: jitted(lora.merge(frozen, lp), X))(lora_params)) < 1e-5
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert error(y, base) > 1e-2


def several(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name])
    image = x[:4].reshape(1, 4, 4, 2)
    for name in ("conv", "conv_again"):
        image = conv(image, params[name], strides=(1, 1), padding="SAME", layout=("NHWC", "HWIO", "NHWC"))
    return image


SEVERAL = {"first": normal(8, 8), "second": normal(8, 8)}
SEVERAL |= {"conv": normal(3, 3, 2, 2), "conv_again": normal(3, 3, 2, 2)}


def test_each_leaf_has_a_key_of_its_own():
    """A library that uses one key for all leaves of a kind gives them all the same A; one that splits its key by the
    number of targets draws all anew when a target is added."""
    every = split(several, SEVERAL, X)[1]
    assert set(every) == set(SEVERAL)
    for one, other in (("first", "second"), ("conv", "conv_again")):
        assert error(every[one].factors["A"], every[other].factors["A"]) > 0.5
    for path in SEVERAL:
        alone = split(several, SEVERAL, X, rules={path: lora.LoRA(rank=2)})[1]
        np.testing.assert_array_equal(alone[path].factors["A"], every[path].factors["A"])


def test_a_rule_that_matches_nothing_is_an_error():
    """A library that ignores it trains nothing, and says nothing."""
    with pytest.raises(ValueError, match="'frist' matches no path .*close matches: first"):
        split(several, SEVERAL, X, rules={"first": lora.LoRA(rank=2), "frist": lora.LoRA(rank=2)})
    with pytest.raises(ValueError, match="the rules adapt no leaf"):
        split(several, SEVERAL, X, rules=lambda path, site: None)


@pytest.mark.parametrize("name", ["heads_out", "heads_in", "experts", "conv_oihw"])
def test_a_kernel_of_three_dimensions_is_never_frozen_in_silence(name):
    """A library that takes two dimensions for granted leaves it frozen, or flattens it along the wrong one."""
    fun, weight, x = KINDS[name]
    site = lora.sites(lambda params: fun(params["w"], x), {"w": weight})["w"]
    inner, outer = (math.prod(weight.shape[d] for d in axes) for axes in (site.in_axes, site.out_axes))
    assert (inner, outer) == {"heads_in": (8, 5), "heads_out": (8, 8), "experts": (8, 5), "conv_oihw": (36, 6)}[name]
    with pytest.raises(ValueError, match="only a matrix is \\(in, out\\) by itself: pass sites="):
        lora.split(KEY, {"w": weight}, {"w": lora.LoRA(rank=2)})

"""What is each variant's own: its mathematics against NumPy, the leaves it adapts, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import error, formed, normal, randomized
from in_numpy import in_numpy
from jax import lax
from zoo import kinds

import lora_jax as lora
from lora_jax.variants.lokr import factorization

VARIANTS = {
    "DoRA": lora.DoRA(rank=2, alpha=3),
    "IA3": lora.IA3(),
    "IA3_in": lora.IA3(side="in"),
    "VeRA": lora.VeRA(rank=3),
    "LoHa": lora.LoHa(rank=2),
    "LoKr": lora.LoKr(rank=1),
    "AdaLoRA": lora.AdaLoRA(rank=2),
    "LoRAFA": lora.LoRAFA(rank=2),
    "LoRAXS": lora.LoRAXS(rank=2),
}
W = normal(6, 8)


def split(variant, weight=W, **axes):
    rules = {"w": variant.at(**axes) if axes else variant}
    frozen, lora_params = lora.split(jax.random.key(0), {"w": weight}, rules)
    return frozen, randomized(lora_params, 0.5)


def merged(variant, weight=W, **axes):
    frozen, lora_params = split(variant, weight, **axes)
    factors = {name: np.asarray(x) for name, x in lora_params["w"].factors.items()}
    return np.asarray(lora.merge(frozen, lora_params)["w"]), factors, lora_params


def test_dora_is_its_formula():
    found, f, _ = merged(VARIANTS["DoRA"])
    v = np.asarray(W) + 1.5 * f["A"] @ f["B"]
    assert error(found, v * f["magnitude"] / np.linalg.norm(v, axis=0)) < 1e-6


def test_dora_s_norm_is_over_the_vocabulary_of_an_embedding_and_of_each_expert():
    _, start = lora.split(jax.random.key(0), {"w": W}, {"w": VARIANTS["DoRA"].at(in_axes=1, out_axes=0)})
    assert error(start["w"].factors["magnitude"], np.linalg.norm(W, axis=1)) < 1e-6
    experts, axes = normal(3, 2, 5, 4), {"batch_axes": 0, "in_axes": (1, 2), "out_axes": 3}
    found, f, _ = merged(VARIANTS["DoRA"], experts, **axes)
    v = np.asarray(experts) + 1.5 * np.einsum("eijr,ero->eijo", f["A"], f["B"])
    norms = np.linalg.norm(v.reshape(3, 10, 4), axis=1)
    assert error(found, v * (f["magnitude"] / norms)[:, None, None]) < 1e-6


def test_dora_s_norm_is_a_constant_to_differentiation():
    frozen, lora_params = split(VARIANTS["DoRA"])
    x = normal(3, 6, seed=4)

    def by_hand(factors):
        v = W + 1.5 * factors["A"] @ factors["B"]
        norms = jnp.linalg.norm(lax.stop_gradient(v), axis=0)
        return jnp.sum(jnp.tanh(x @ v * factors["magnitude"] / norms))

    lifted = lora.lift(lambda params: jnp.sum(jnp.tanh(x @ params["w"])))
    found = jax.grad(lambda lp: lifted(lora.attach(frozen, lp)))(lora_params)
    assert error(found["w"].factors, jax.grad(by_hand)(lora_params["w"].factors)) < 1e-5


def test_a_zero_column_of_dora_trains():
    params = {"w": W.at[:, 3].set(0.0)}
    frozen, lora_params = lora.split(jax.random.key(0), params, {"w": VARIANTS["DoRA"]})
    lifted = lora.lift(lambda params: jnp.sum((normal(3, 6, seed=4) @ params["w"] - 1) ** 2))
    losses = []
    for _ in range(4):
        value, grads = jax.value_and_grad(lambda lp: lifted(lora.attach(frozen, lp)))(lora_params)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert grads["w"].factors["B"][:, 3].any() or grads["w"].factors["magnitude"][3]
        lora_params = jax.tree.map(lambda p, g: p - 1e-3 * g, lora_params, grads)
        losses.append(float(value))
    assert losses == sorted(losses, reverse=True)
    assert lora_params["w"].factors["magnitude"][3] != 0


def test_dora_in_bfloat16_keeps_float32_norms():
    weight = normal(64, 8).astype(jnp.bfloat16)
    frozen, lora_params = split(lora.DoRA(rank=2), weight)
    scale = lora.attach(frozen, lora_params)["w"].base.operands[1]
    f = {name: np.asarray(x, np.float64) for name, x in lora_params["w"].factors.items()}
    exact = f["magnitude"] / np.linalg.norm(np.asarray(weight, np.float64) + f["A"] @ f["B"], axis=0)
    assert scale.dtype == jnp.float32
    assert error(scale, exact) < 2e-3  # A meets the base in bfloat16, and nothing else is rounded
    jaxpr = jax.make_jaxpr(lambda lp: lora.attach(frozen, lp)["w"].base.operands[1])(lora_params)
    made = {(v.aval.shape, str(v.aval.dtype)) for eqn in jaxpr.eqns for v in eqn.outvars}
    assert (weight.shape, "float32") not in made


def test_loha_and_lokr_are_their_formulas():
    found, f, _ = merged(lora.LoHa(rank=2, alpha=3))
    assert error(found, W + 1.5 * (f["A1"] @ f["B1"]) * (f["A2"] @ f["B2"])) < 1e-6
    found, f, _ = merged(lora.LoKr(rank=1, alpha=3))
    assert error(found, W + 3 * np.kron(f["C"], f["A"] @ f["B"])) < 1e-6
    found, f, _ = merged(lora.LoKr(rank=4))
    assert error(found, W + np.kron(f["C"], f["AB"])) < 1e-6
    wide = normal(36, 64)
    found, f, _ = merged(lora.LoKr(rank=1, decompose_both=True), wide)
    assert error(found, wide + np.kron(f["C1"] @ f["C2"], f["A"] @ f["B"])) < 1e-6


def test_lokr_splits_sides_of_several_axes():
    """12 heads of 64 as 24 × 32, inside the heads' size; 3 of 8 as 3 × 8, between the two."""
    for heads, size, first in ((12, 64, 24), (3, 8, 3)):
        weight, axes = normal(6, heads, size), {"in_axes": 0, "out_axes": (1, 2)}
        found, f, _ = merged(lora.LoKr(rank=1), weight, **axes)
        c, ab = f["C"].reshape(2, first), np.tensordot(f["A"], f["B"], 1).reshape(3, -1)
        assert error(found, weight + np.kron(c, ab).reshape(weight.shape)) < 1e-6


def test_factorization_is_peft_s():
    """The values in the docstring of PEFT's own `factorization`, and some that it gave."""
    values = {(256, -1): 16, (128, -1): 8, (127, -1): 1, (128, 4): 4, (768, -1): 24, (768, 500): 24, (12, 5): 3}
    assert {key: factorization(*key) for key in values} == values


def test_lora_xs_takes_singular_vectors():
    _, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRAXS(rank=3)})
    f = lora_params["w"].factors
    u, s, v = np.linalg.svd(W)
    assert error(f["A"] @ f["B"], u[:, :3] * s[:3] @ v[:3]) < 1e-5


@pytest.mark.parametrize("variant", [lora.DoRA(rank=3), lora.LoRAXS(rank=3)])
def test_what_begins_from_values_needs_them(variant):
    params = {"w": jax.ShapeDtypeStruct((6, 8), "float32")}
    split = functools.partial(lora.split, jax.random.key(0), rules={"w": variant})
    with pytest.raises(ValueError, match="begins from the leaf's values, and this one has none: split inside"):
        split(params)
    frozen, lora_params = jax.eval_shape(split, params)
    found = lora.explain(lambda params, x: x @ params["w"])(lora.attach(frozen, lora_params), jnp.ones((4, 6)))
    assert found.base_flops >= 2 * 4 * 6 * 8


def test_lora_fa_s_gradient_is_projected():
    """What B's step makes of ΔW is the projection of W's gradient on A's columns, whatever the scale."""
    frozen, lora_params = split(lora.LoRAFA(rank=2, alpha=6))
    g, a = np.asarray(normal(6, 8, seed=7)), np.asarray(lora_params["w"].factors["A"])
    grads = jax.tree.map(jnp.zeros_like, lora_params)
    grads["w"].factors["B"] = 3 * a.T @ g
    updates, _ = lora.fa_gradients().update(grads, optax.EmptyState(), lora_params)
    assert error(3 * a @ np.asarray(updates["w"].factors["B"]), a @ np.linalg.pinv(a) @ g) < 1e-5
    with pytest.raises(ValueError, match="needs A to correct the gradient of B"):
        lora.fa_gradients().update(grads, optax.EmptyState())
    lifted = lora.lift(lambda params: jnp.sum(normal(3, 6) @ params["w"]))
    assert not jax.grad(lambda lp: lifted(lora.attach(frozen, lp)))(lora_params)["w"].factors["A"].any()


def test_ia3_divides_to_unmerge():
    frozen, lora_params = split(lora.IA3())
    result = lora.merge(frozen, lora_params)
    assert error(result["w"], W * lora_params["w"].factors["scale"]) < 1e-6
    assert error(lora.unmerge(result, lora_params)["w"], W) < 1e-6
    lora_params["w"].factors["scale"] = jnp.zeros(8)
    with pytest.raises(ValueError, match="48 of 48 merged weights are not finite"):
        lora.unmerge(lora.merge(frozen, lora_params), lora_params)


VERA_PARAMS = {"up": normal(3, 4, 10), "down": normal(10, 4, seed=1)}
VERA_RULES = {"up": lora.VeRA(5, dropout=0.5).at(batch_axes=0, in_axes=1, out_axes=2), "down": lora.VeRA(5)}
POOL = "shared/VeRA-5-float32"


def test_vera_s_projections_are_there_once():
    frozen, lora_params = lora.split(jax.random.key(0), VERA_PARAMS, VERA_RULES)
    assert {n: x.shape for n, x in lora_params[POOL].factors.items()} == {"A": (10, 5), "B": (5, 10)}
    summary = lora.summary(frozen, lora_params)
    assert [row.path for row in summary.rows] == ["down", "up"]
    assert summary.trained == 5 + 4 + 3 * (5 + 10)
    lora_params = randomized(lora_params, 0.5)
    a, b = (np.asarray(lora_params[POOL].factors[name]) for name in "AB")
    up = {name: np.asarray(x) for name, x in lora_params["up"].factors.items()}
    delta = np.einsum("ir,er,ro,eo->eio", a[:4], up["d"], b, up["b"])
    found = lora.merge(frozen, lora_params)
    assert error(found["up"], np.asarray(VERA_PARAMS["up"]) + delta) < 1e-6
    assert lora.dropout(jax.random.key(0), lora_params)[POOL].keys is None
    assert error(lora.unmerge(found, lora_params), VERA_PARAMS) < 1e-6


def test_vera_without_its_projections_is_an_error():
    frozen, lora_params = lora.split(jax.random.key(0), VERA_PARAMS, VERA_RULES)
    alone = {path: adapter for path, adapter in lora_params.items() if path != POOL}
    for use in (lora.attach, lora.merge, lora.summary):
        with pytest.raises(ValueError, match=f"'.*' as VeRA.* needs what lora_params holds at '{POOL}'"):
            use(frozen, alone)
    small = lora_params | lora.shared(lora.VeRA(5), {"A": jnp.ones((6, 5)), "B": jnp.ones((5, 10))})
    with pytest.raises(ValueError, match=r"A \(6, 5\) and B \(5, 10\) are smaller than the leaf"):
        lora.attach(frozen, small)
    with pytest.raises(ValueError, match=r"shares factors \['A', 'B'\], not \['A'\]"):
        lora.shared(lora.VeRA(5), {"A": jnp.ones((6, 5))})
    with pytest.raises(ValueError, match="holds shared factors there: rename"):
        lora.split(jax.random.key(0), {"shared": {"VeRA-5-float32": W}}, {".*": lora.VeRA(5)})


@pytest.mark.parametrize("name", VARIANTS)
def test_many_adapters_at_once(name):
    """Under vmap over adapters, as a bank has them, and under checkpoint."""
    frozen, first = split(VARIANTS[name])
    both = jax.tree.map(lambda *xs: np.stack(xs), first, randomized(first, 0.5, seed=1))
    x = normal(3, 6, seed=4)

    @jax.checkpoint
    def loss(lora_params):
        return jnp.sum(jnp.tanh(lora.lift(lambda params: x @ params["w"])(lora.attach(frozen, lora_params))))

    step = jax.value_and_grad(loss)
    value, grads = jax.jit(jax.vmap(step))(both)
    assert error((value[0], jax.tree.map(lambda g: g[0], grads)), in_numpy(step)(first)) < 1e-5


def test_a_variant_says_what_it_does_not_adapt():
    loss, params, batch = kinds()
    sites = lora.sites(loss, params, *batch)
    refused = (("embed", lora.LoKr(rank=1), "linear, conv"), ("kernel", lora.IA3(side="in"), "linear, embedding"))
    for path, variant, those in refused:
        with pytest.raises(ValueError, match=f"'{path}' is of kind .*, and .* adapts leaves of kind {those} alone"):
            lora.split(jax.random.key(0), params, {path: variant}, sites=sites)
    for variant in (lora.LoHa(7), lora.AdaLoRA(7), lora.LoRAXS(7), lora.DoRA(7)):
        with pytest.raises(ValueError, match="rank 7 is above 6, the smaller of the in and out sizes"):
            split(variant)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.DoRA(rank=2, scaling="half"), r"DoRA\(scaling='half'\)"),
        (lambda: lora.VeRA(rank=0), r"VeRA\(rank=0\): the rank is a whole number, 1 or more"),
        (lambda: lora.LoHa(rank=2, alpha=0), r"LoHa\(alpha=0\): alpha is a finite number other than 0"),
        (lambda: lora.LoKr(rank=2, factor=0), r"LoKr\(factor=0\): the factor is a whole number, 1 or more, or -1"),
        (lambda: lora.AdaLoRA(rank=2, deviation=0), r"AdaLoRA\(deviation=0\): the deviation is positive"),
        (lambda: lora.AdaLoRA(rank=2, dropout=1), r"AdaLoRA\(dropout=1\): the dropout is a probability"),
        (lambda: lora.IA3(side="both"), r"IA3\(side='both'\): the side is 'out' or 'in'"),
        (lambda: lora.LoRA(rank=None), r"LoRA\(rank=None\): the rank is a whole number, 1 or more"),
        (lambda: lora.LoRA(rank=float("inf")), r"LoRA\(rank=inf\): the rank is a whole number, 1 or more"),
        (lambda: lora.LoRA(rank=2, alpha="16"), r"LoRA\(alpha='16'\): alpha is a finite number other than 0"),
        (lambda: lora.VeRA(rank=2, d_initial=0), r"VeRA\(d_initial=0\): .* or neither d nor b would train"),
        (lambda: lora.LoHa(rank=2, dropout=None), r"LoHa\(dropout=None\): the dropout is a probability"),
        (lambda: lora.LoKr(rank=2, factor=2.5), r"LoKr\(factor=2.5\): the factor is a whole number"),
        (lambda: lora.LoRA(rank=2, dtype="foo"), r"LoRA\(dtype='foo'\): the dtype is a floating one"),
        (lambda: lora.LoRA(rank=2, dtype=None), r"LoRA\(dtype=None\): the dtype is a floating one"),
        (lambda: lora.LoRAXS(rank=2, dtype="int32"), r"LoRAXS\(dtype='int32'\): the dtype is a floating one"),
        (lambda: lora.IA3(dtype="int32"), r"IA3\(dtype='int32'\): the dtype is a floating one"),
        (lambda: lora.Full(dtype="int8"), r"Full\(dtype='int8'\): the dtype is a floating one"),
        (lambda: lora.lora_plus(optax.sgd, 1.0, ratio=0), r"lora_plus\(ratio=0\)"),
    ],
)
def test_what_makes_no_sense_is_an_error_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("variant", "same"),
    [
        (lora.LoRA(np.int64(2), np.float32(4), dropout=np.float32(0.5)), lora.LoRA(2, 4, dropout=0.5)),
        (lora.LoKr(1, factor=np.int64(2), decompose_both=np.bool_(True)), lora.LoKr(1, factor=2, decompose_both=True)),
        (lora.Full(dtype=jnp.bfloat16), lora.Full(dtype="bfloat16")),
    ],
)
def test_hyperparameters_have_one_form(variant, same, tmp_path):
    """NumPy's numbers and JAX's dtypes are Python's own and names, or no file could hold them."""
    assert variant == same
    lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": variant})[1]
    assert lora.load(lora.save(tmp_path / "adapter", lora_params))["w"].variant == same


@pytest.mark.parametrize("variant", [lora.LoHa, lora.LoKr])
def test_what_only_draws_says_how(variant):
    with pytest.raises(ValueError, match="'w' .*: init='pissa' is neither 'normal' nor 'uniform' nor a function"):
        split(variant(rank=1, init="pissa"))
    with pytest.raises(ValueError, match=r"'w' .*: init returned an array of shape \(1, 1\) for a factor of shape"):
        split(variant(rank=1, init=lambda key, shape, dtype: jnp.ones((1, 1), dtype)))


def test_biases_alone_train_with_full():
    params = {"up": {"kernel": W, "bias": jnp.zeros(8)}}
    frozen, lora_params = lora.split(jax.random.key(0), params, {".*/bias": lora.Full()})
    assert lora.summary(frozen, lora_params).trained == 8


@pytest.mark.parametrize("name", VARIANTS)
def test_lora_plus_trains_every_variant(name):
    """By 16 what makes the outputs and by 1 what else trains; what is frozen stays."""
    _, lora_params = split(VARIANTS[name])
    tx = lora.lora_plus(optax.sgd, optax.constant_schedule(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora_params), tx.init(lora_params), lora_params)
    labels = VARIANTS[name].labels()
    rates = {"frozen": 0, "B": -16, "b": -16}
    for adapter in updates.values():
        for factor, x in adapter.factors.items():
            np.testing.assert_array_equal(x, rates.get(labels[factor], -1))


def test_lora_plus_is_slow_at_embeddings():
    sites = lora.sites(lambda params, i: params["w"][i], {"w": W}, jnp.arange(3))
    _, lora_params = lora.split(jax.random.key(0), {"w": W}, {"w": lora.LoRA(2)}, sites=sites)
    tx = lora.lora_plus(optax.sgd, 1.0, embedding_learning_rate=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora_params), tx.init(lora_params))
    assert {float(x.max()) for x in updates["w"].factors.values()} == {-0.5}


@dataclasses.dataclass(frozen=True)
class SelfAdjoint(lora.Variant):
    """A user's own, from outside the package: ΔW = A·diag(e)·Aᵀ, for square weights."""

    rank: int

    def initial(self, key, weight, site):
        batch, inner, outer = site.sizes()
        if inner != outer:
            raise ValueError(f"A·diag(e)·Aᵀ is square, and this leaf is {inner} by {outer}")
        a = jax.random.normal(key, (*batch, *inner, self.rank)) / self.rank
        return weight, {"A": a, "e": jnp.zeros((*batch, self.rank))}

    def delta(self, factors, site):
        batch, inner, outer = site.axes()
        rank = (lora.Axis("rank", self.rank),)
        a, e = factors["A"], factors["e"]
        return lora.Network((a, e, a), (batch + inner + rank, batch + rank, batch + outer + rank))

    def labels(self):
        return {"A": "A", "e": "B"}


def test_a_user_s_own_variant(tmp_path):
    params = {"w": normal(8, 8), "v": W}
    with pytest.raises(ValueError, match=r"'v' .*is square, and this leaf is \(6,\) by \(8,\)"):
        lora.split(jax.random.key(0), params, {"v": SelfAdjoint(2)})
    frozen, lora_params = lora.split(jax.random.key(0), params, {"w": SelfAdjoint(rank=3)})
    lora_params = lora.load(lora.save(tmp_path / "adapter", randomized(lora_params, 0.5)))
    x = normal(5, 8, seed=3)

    def loss(params):
        return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)

    delta = np.asarray(lora.merge(frozen, lora_params)["w"] - params["w"])
    assert error(delta.T, delta) < 1e-5
    step = jax.jit(jax.value_and_grad(lambda lp: lora.lift(loss)(lora.attach(frozen, lp))))
    assert error(step(lora_params), jax.value_and_grad(lambda lp: loss(lora.merge(frozen, lp)))(lora_params)) < 1e-5
    assert formed(jax.make_jaxpr(step)(lora_params), lora_params) == []
    tx = lora.optimizer(optax.sgd(1e-2))
    updates, _ = tx.update(step(lora_params)[1], tx.init(lora_params), lora_params)
    assert float(step(optax.apply_updates(lora_params, updates))[0]) < float(step(lora_params)[0])
    del lora.Variant.registry["SelfAdjoint"]


def test_a_variant_that_forgets_a_label_or_takes_a_name_is_an_error():
    class Forgetful(lora.LoRA):
        def labels(self):
            return {"A": "A"}

    with pytest.raises(ValueError, match=r"begins with the factors \['A', 'B'\] and has labels for \['A'\]"):
        lora.split(jax.random.key(0), {"w": W}, {"w": Forgetful(2)})
    with pytest.raises(TypeError, match=r"lora_jax.variants.lora has one of this name already"):
        type("LoRA", (lora.LoRA,), {"__module__": "__main__"})
    with pytest.raises(TypeError, match="test_variants has one of this name already"):
        type("Forgetful", (lora.LoRA,), {"__module__": "elsewhere"})
    for module in ("__main__", "elsewhere"):  # tried out first, and then moved
        type("Moved", (lora.LoRA,), {"__module__": module})

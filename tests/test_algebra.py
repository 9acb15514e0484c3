"""Adapters combined, extracted, resized, scaled: laws over leaves of every shape, against dense float64 linear algebra."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, formed, normal, randomized

import lora_jax as lora
from lora_jax import task_arithmetic
from lora_jax.combine import METHODS
from lora_jax.variants.base import rank_axis

PEFT = Path(__file__).parent / "fixtures" / "peft_combinations.npz"

# name: shape, batch axes, in axes, out axes. The last is smaller than some ranks are together.
LEAVES = {
    "dense": ((11, 7), (), (0,), (1,)),
    "out_in": ((7, 12), (), (1,), (0,)),
    "heads": ((4, 9, 2, 5), (0,), (1,), (2, 3)),
    "conv": ((8, 4, 3, 3), (), (1, 2, 3), (0,)),
    "experts": ((2, 8, 3, 7), (0, 2), (1,), (3,)),
    "narrow": ((3, 13), (), (0,), (1,)),
}


@dataclasses.dataclass(frozen=True)
class Diagonal(lora.LoRA):
    """Another variant: A·diag(d)·B, with one A for all stacked layers, and A frozen."""

    def initial(self, key, weight, site):
        weight, factors = super().initial(key, weight, site)
        first = factors["A"][(0,) * len(site.batch_axes)]
        return weight, {"A": first, "B": factors["B"], "d": jnp.ones((*site.sizes()[0], self.rank))}

    def delta(self, factors, site):
        batch, inner, outer = site.axes()
        rank = (rank_axis(self.rank),)
        axes = (inner + rank, batch + rank, batch + rank + outer)
        return lora.Network((factors["A"], factors["d"], factors["B"]), axes, self.scale)

    def labels(self):
        return {"A": "frozen", "B": "B", "d": "d"}


@dataclasses.dataclass(frozen=True)
class Elementwise(lora.Variant):
    """Another: (A·B) times (C·D), entry by entry, of rank 4."""

    def initial(self, key, weight, site):
        batch, inner, outer = site.sizes()
        a, b = jnp.ones((*batch, *inner, 2)), jnp.ones((*batch, 2, *outer))
        return weight, {"A": a, "B": b, "C": a, "D": b}

    def delta(self, factors, site):
        batch, inner, outer = site.axes()
        r, s = (dataclasses.replace(rank_axis(2), name=name) for name in "rs")
        axes = tuple(batch + rest for rest in (inner + (r,), (r,) + outer, inner + (s,), (s,) + outer))
        return lora.Network(tuple(factors[name] for name in "ABCD"), axes, 0.5)

    def labels(self):
        return dict.fromkeys("ABCD", "factor")


@dataclasses.dataclass(frozen=True)
class Rescaled(lora.LoRA):
    """A variant that changes the base, as DoRA does."""

    def apply(self, base, factors, site):
        return super().apply(base, factors, site).times(factors["B"].sum(), ())


VARIANTS = {
    "standard": lora.LoRA(2, alpha=6),
    "rank_stabilized": lora.LoRA(3, alpha=2, scaling="rank_stabilized"),
    "opposite": lora.LoRA(3, alpha=-1.5),
    "diagonal": Diagonal(2, alpha=1),
    "elementwise": Elementwise(),
}
WEIGHTS = [0.7, -0.4, 1.2, 0.5, -2.0]


def placed(name, variant):
    _, batch, inner, outer = LEAVES[name]
    return variant.at(batch_axes=batch, in_axes=inner, out_axes=outer)


@functools.cache
def base():
    return {name: normal(*shape, seed=i) for i, (name, (shape, *_)) in enumerate(LEAVES.items())}


@functools.cache
def made(variant, seed=0, leaves=tuple(LEAVES)):
    """Random adapters of one variant."""
    chosen = VARIANTS[variant] if isinstance(variant, str) else variant
    rules = {name: placed(name, chosen) for name in leaves}
    params = base()
    shapes = jax.eval_shape(functools.partial(lora.split, rules=rules), jax.random.key(0), params)[1]
    return randomized(shapes, scale=0.5, seed=seed + 100 * len(leaves))


def several():
    """One adapter of each variant; each lacks the leaf of its number."""
    names = list(LEAVES)
    return [
        {path: adapter for path, adapter in made(variant, seed=i).items() if path != names[i]}
        for i, variant in enumerate(VARIANTS)
    ]


def delta(adapter):
    """ΔW by NumPy's einsum, in float64."""
    network = adapter.variant.delta(adapter.factors, adapter.site)
    axes = {axis for axes in network.axes for axis in axes}
    letter = dict(zip(sorted(axis.name for axis in axes), "abcdefghijkl", strict=False))
    spec = ",".join("".join(letter[axis.name] for axis in own) for own in network.axes)
    out = "".join(letter[str(d)] for d in range(len(adapter.site.shape)))
    return network.scale * np.einsum(f"{spec}->{out}", *(np.asarray(x, np.float64) for x in network.operands))


def total(adapters, weights, path):
    parts = [w * delta(lp[path]) for lp, w in zip(adapters, weights, strict=True) if path in lp]
    return np.sum(parts, axis=0)


def as_matrices(array, path):
    shape, batch, inner, outer = LEAVES[path]
    sizes = [shape[d] for d in batch]
    return np.transpose(array, (*batch, *inner, *outer)).reshape(*sizes, np.prod([shape[d] for d in inner]), -1)


def best(array, path, rank):
    """The best approximation of that rank of each matrix, as matrices."""
    u, s, vt = np.linalg.svd(as_matrices(array, path), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@functools.cache
def combined(method, rank=None, **options):
    return jax.jit(functools.partial(lora.combine, method=method, rank=rank, **options))(several(), jnp.array(WEIGHTS))


@pytest.mark.parametrize("path", LEAVES)
def test_cat_is_the_sum(path):
    found, expected = combined("cat")[path], total(several(), WEIGHTS, path)
    assert error(delta(found), expected) < 1e-6
    assert found.variant.scale == 1
    merged = lora.merge({path: base()[path]}, {path: found})[path]
    assert error(merged, base()[path] + expected) < 1e-6


@pytest.mark.parametrize(("path", "rank"), itertools.product(LEAVES, [1, 4, 40]))
def test_svd_is_the_best_of_its_rank(path, rank):
    """At a rank that suffices, the sum itself; and never of more rank than the leaf can have."""
    found, expected = combined("svd", rank)[path], total(several(), WEIGHTS, path)
    assert error(as_matrices(delta(found), path), best(expected, path, rank)) < 1e-5
    assert found.variant.rank == min(rank, found.site.max_rank)


def test_svd_without_a_rank_keeps_the_largest():
    adapters = [made("standard"), made("opposite")]
    assert {a.variant.rank for a in lora.combine(adapters, [1, 1], method="svd").values()} == {3}
    only = lora.combine(adapters[:1], [2.0], method="svd", rank=9)["dense"]
    assert only.variant.rank == 2
    assert error(delta(only), 2 * delta(adapters[0]["dense"])) < 1e-6


def test_lifted_functions_take_what_is_combined():
    def model(params, x):
        return jnp.tanh(x @ params["dense"])

    params, x = {"dense": base()["dense"]}, normal(5, 11)
    lora_params = {"dense": combined("cat")["dense"]}
    found = lora.lift(model)(lora.attach(params, lora_params), x)
    assert error(found, model(lora.merge(params, lora_params), x)) < 1e-5


def test_a_stacked_leaf_is_combined_layer_by_layer():
    adapters = [made("standard"), made("standard", seed=1)]
    for method in ("svd", "linear", "magnitude_prune", "ties", "ties_svd"):
        options = {"density": 0.4} if "prune" in method or "ties" in method else {}
        options |= {"rank": 2} if "svd" in method else {}
        whole = lora.combine(adapters, [0.5, 2.0], method=method, **options)
        for layer in range(2):
            own = [
                {
                    "heads": lora.Adapter(
                        {name: x[layer] for name, x in lp["heads"].factors.items()},
                        lp["heads"].variant,
                        lora.Site((9, 2, 5), "linear", (), (0,), (1, 2)),
                    )
                }
                for lp in adapters
            ]
            one = lora.combine(own, [0.5, 2.0], method=method, **options)["heads"]
            assert error(delta(one), delta(whole["heads"])[layer]) < 1e-5, method


@pytest.mark.parametrize("method", [m for m in METHODS if "svd" in m and m != "svd"])
def test_svd_of_pruned_deltas(method):
    """What these make of ΔWs is checked against PEFT; here, that they take leaves and variants of every kind."""
    options = {"density": 1.0, **({"key": jax.random.key(0)} if "dare" in method else {})}
    adapters = [made("standard"), made("elementwise"), made("rank_stabilized")]
    for path, found in lora.combine(adapters, [1.0, -2.0, 0.5], method=method, rank=3, **options).items():
        assert found.variant.rank == 3
        if "ties" not in method:  # of density 1, the sum
            expected = total(adapters, [1.0, -2.0, 0.5], path)
            assert error(as_matrices(delta(found), path), best(expected, path, 3)) < 1e-5


def test_dare_keeps_the_expectation():
    tensor = jnp.ones(40_000)
    kept = task_arithmetic.at_random(jax.random.key(0), tensor, 0.2)
    assert set(np.unique(kept)) == {0, 5}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    a, b = (
        lora.combine([made("standard")], [1.0], method="dare_linear", density=0.5, key=jax.random.key(seed))
        for seed in (0, 1)
    )
    assert not np.array_equal(a["dense"].factors["A"], b["dense"].factors["A"])
    alone = {"conv": made("standard")["conv"]}
    alone = lora.combine([alone], [1.0], method="dare_linear", density=0.5, key=jax.random.key(0))
    np.testing.assert_array_equal(alone["conv"].factors["A"], a["conv"].factors["A"])


def test_weights_may_be_traced_and_have_gradients():
    adapters = [made("standard"), made("opposite")]
    target = normal(11, 7)

    def inner(weights):
        return jnp.vdot(
            lora.merge({"dense": jnp.zeros((11, 7))}, {"dense": lora.combine(adapters, weights)["dense"]})["dense"],
            target,
        )

    grads = jax.jit(jax.grad(inner))(jnp.array([0.3, -1.0]))
    expected = [np.vdot(delta(lp["dense"]), np.asarray(target, np.float64)) for lp in adapters]
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_negate_add_subtract(variant):
    lora_params, other = made(variant), made("rank_stabilized", seed=5)
    for path, adapter in lora_params.items():
        expected, second = delta(adapter), delta(other[path])
        scaled = lora.scale({path: adapter}, 0.3)[path]
        assert error(delta(scaled), 0.3 * expected) < 1e-6
        assert jax.tree.structure(scaled) == jax.tree.structure(adapter)
        negated = lora.negate({path: adapter})
        np.testing.assert_array_equal(delta(negated[path]), -expected)
        assert np.abs(delta(lora.add({path: adapter}, negated)[path])).max() < 1e-6
        if path in ("dense", "heads"):
            assert error(delta(lora.add({path: adapter}, other)[path]), expected + second) < 1e-6
            assert error(delta(lora.subtract({path: adapter}, other)[path]), expected - second) < 1e-6


def test_scale_leaves_frozen_factors_alone():
    lora_params = made("diagonal")
    scaled = lora.scale(lora_params, 2.0)["heads"]
    assert scaled.factors["A"] is lora_params["heads"].factors["A"]
    np.testing.assert_array_equal(scaled.factors["d"], 2 * lora_params["heads"].factors["d"])


@functools.cache
def resized(variant, rank):
    return jax.jit(functools.partial(lora.resize, rank=rank))(made(variant), key=jax.random.key(7))


@pytest.mark.parametrize(("variant", "path"), itertools.product(["rank_stabilized", "opposite"], LEAVES))
def test_resize_cuts_off_the_least(variant, path):
    old, new = made(variant)[path], resized(variant, 2)[path]
    values = np.linalg.svd(as_matrices(delta(old), path), compute_uv=False)
    lost = np.linalg.norm(as_matrices(delta(old) - delta(new), path), axis=(-2, -1))
    np.testing.assert_allclose(lost, np.linalg.norm(values[..., 2:], axis=-1), rtol=1e-5)
    assert new.variant.rank == 2
    assert new.variant.scale == pytest.approx(old.variant.scale, rel=1e-12)
    assert (new.variant.scaling, new.variant.dtype) == (old.variant.scaling, old.variant.dtype)


def test_resize_grows_exactly_and_what_grew_trains():
    leaves = tuple(name for name in LEAVES if name != "narrow")
    for variant in ("standard", "rank_stabilized"):
        old = made(variant, leaves=leaves)
        grown = lora.resize(old, 6, key=jax.random.key(7))
        for path, adapter in grown.items():
            assert error(delta(adapter), delta(old[path])) < 1e-7
            rank = old[path].variant.rank
            np.testing.assert_array_equal(adapter.factors["A"][..., :rank], old[path].factors["A"])
            new = np.asarray(adapter.factors["A"][..., rank:])
            inputs = np.prod(adapter.site.sizes()[1])
            assert new.shape[-1] == 6 - rank
            assert 0.6 < new.std() * np.sqrt(inputs) < 1.6  # as at the start of training
        frozen = {path: base()[path] for path in leaves}
        grads = jax.grad(lambda lp, frozen=frozen: sum(jnp.sum(x**2) for x in lora.merge(frozen, lp).values()))(grown)
        for path, adapter in grads.items():
            rows = np.moveaxis(np.asarray(adapter.factors["B"]), len(LEAVES[path][1]), 0)
            assert (np.abs(rows).reshape(6, -1).max(1) > 0).all()


def test_resizing_what_has_not_trained_leaves_it_trainable():
    _, fresh = lora.split(jax.random.key(0), {"w": jnp.ones((8, 6))}, {"w": lora.LoRA(4)})
    for small in (lora.resize(fresh, 2), lora.combine([fresh, fresh], [1, 1], method="svd", rank=2)):
        assert not small["w"].factors["B"].any()
        np.testing.assert_allclose(np.linalg.norm(small["w"].factors["A"], axis=0), 1, rtol=1e-6)


@functools.cache
def tuned():
    return lora.merge(base(), made("rank_stabilized"))


@pytest.mark.parametrize("path", LEAVES)
def test_extract_finds_what_was_merged(path):
    rules = {path: placed(path, lora.LoRA(3, alpha=-12))}
    found = lora.extract(base(), tuned(), rules)
    assert list(found) == [path]
    assert found[path].variant == lora.LoRA(3, alpha=-12)
    assert error(delta(found[path]), delta(made("rank_stabilized")[path])) < 1e-5


@functools.cache
def moved():
    return {path: x + normal(*x.shape, seed=50) for path, x in base().items()}


@pytest.mark.parametrize("path", LEAVES)
def test_extract_is_the_best_of_its_rank(path):
    """Eckart and Young: the error is that of the singular values left out, for each layer."""
    found = lora.extract(base(), moved(), {path: placed(path, lora.LoRA(2))})[path]
    change = np.asarray(moved()[path], np.float64) - np.asarray(base()[path], np.float64)
    assert error(as_matrices(delta(found), path), best(change, path, 2)) < 1e-4
    values = np.linalg.svd(as_matrices(change, path), compute_uv=False)
    lost = np.linalg.norm(as_matrices(change - delta(found), path), axis=(-2, -1))
    np.testing.assert_allclose(lost, np.linalg.norm(values[..., 2:], axis=-1), rtol=1e-5)


def test_extract_by_rank_carries_all_that_changed():
    before = {"a": normal(8, 6), "b": normal(8, 6), "stack": normal(3, 5, 4), "bias": normal(6), "same": normal(6)}
    after = {name: x if name in ("b", "same") else x + normal(*x.shape, seed=3) for name, x in before.items()}

    def model(params, x):
        x = x @ params["a"] + params["bias"] + x @ params["b"] + params["same"]
        return sum(x[:, :5] @ params["stack"][i] for i in range(3))

    sites = lora.sites(model, before, normal(2, 8))
    found = lora.extract(before, after, 99, sites=sites)
    assert {path: type(adapter.variant).__name__ for path, adapter in found.items()} == {
        "a": "LoRA",
        "bias": "Full",
        "stack": "LoRA",
    }
    assert found["a"].variant.rank == 6
    merged = lora.merge(before, found)
    assert error(merged, after) < 1e-6
    with pytest.raises(ValueError, match="'stack' has shape .* pass sites="):
        lora.extract(before, after, 2)
    with pytest.raises(ValueError, match="nothing to extract"):
        lora.extract(before, before, 2)


def test_extract_under_jit():
    rules = {"dense": lora.LoRA(3)}
    found = jax.jit(lambda a, b: lora.extract(a, b, rules))({"dense": base()["dense"]}, {"dense": tuned()["dense"]})
    assert error(delta(found["dense"]), delta(made("rank_stabilized")["dense"])) < 1e-5
    with pytest.raises(ValueError, match="give rules"):
        jax.jit(lambda a, b: lora.extract(a, b, 2))({"dense": base()["dense"]}, {"dense": tuned()["dense"]})


def test_full_moves_from_the_base():
    params = {"bias": jnp.array([1.0, 2.0, -3.0])}
    rules = {"bias": lora.Full()}
    made = [
        {"bias": dataclasses.replace(lora.split(jax.random.key(0), params, rules)[1]["bias"], factors={"weight": w})}
        for w in (jnp.array([2.0, 2.0, 0.0]), jnp.array([1.0, 4.0, -5.0]))
    ]
    found = lora.combine([*made, {}], [2.0, 0.5, 9.0], base=params)
    np.testing.assert_allclose(lora.merge(params, found)["bias"], [3.0, 3.0, 2.0])
    for method in ("svd", "linear"):
        np.testing.assert_allclose(
            lora.combine(made, [2.0, 0.5], method=method, base=params)["bias"].factors["weight"], [3.0, 3.0, 2.0]
        )
    ties = lora.combine(made, [1.0, 1.0], method="ties", density=1.0, base=params)
    np.testing.assert_allclose(ties["bias"].factors["weight"], [2.0, 4.0, 0.0])
    np.testing.assert_allclose(lora.negate(made[0], base=params)["bias"].factors["weight"], [0.0, 2.0, -6.0])
    np.testing.assert_allclose(lora.subtract(*made, base=params)["bias"].factors["weight"], [2.0, 0.0, 2.0])
    assert lora.resize(made[0], 4) == made[0]
    for call in (lambda: lora.combine(made, [1, 1]), lambda: lora.scale(made[0], 2.0)):
        with pytest.raises(ValueError, match="'bias' trains in Full, .* pass base="):
            call()


def test_bfloat16_factors_stay_so():
    low = made(lora.LoRA(2, dtype="bfloat16"))
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    for found, expected in (
        (lora.combine([low, low], [1, 0.5]), lora.combine([high, high], [1, 0.5])),
        (lora.combine([low, low], [1, 0.3], method="svd"), lora.combine([high, high], [1, 0.3], method="svd")),
        (lora.combine([low, low], [1, 0.3], method="linear"), lora.combine([high, high], [1, 0.3], method="linear")),
        (lora.resize(low, 1), lora.resize(high, 1)),
        (lora.scale(low, 0.3), lora.scale(high, 0.3)),
        (lora.resize(low, 3, key=jax.random.key(0)), high),
    ):
        for path, adapter in found.items():
            assert {x.dtype for x in adapter.factors.values()} == {jnp.dtype(jnp.bfloat16)}
            assert adapter.variant.dtype == "bfloat16"
            assert error(delta(adapter), delta(expected[path])) < 2**-7
    mixed = lora.combine([low, made("standard")], [1, 1])
    assert {x.dtype for x in jax.tree.leaves(mixed)} == {jnp.dtype(jnp.float32)}


OPERATIONS = {
    "cat": lambda lp: lora.combine([lp, lp], [1.0, 2.0]),
    "svd": lambda lp: lora.combine([lp, lp], [1.0, 2.0], method="svd", rank=1),
    "linear": lambda lp: lora.combine([lp, lp], [1.0, 2.0], method="linear"),
    "ties": lambda lp: lora.combine([lp, lp], [1.0, 2.0], method="ties", density=0.5),
    "dare_ties": lambda lp: lora.combine([lp, lp], [1.0, 2.0], method="dare_ties", density=0.5, key=jax.random.key(0)),
    "scale": lambda lp: lora.scale(lp, 2.0),
    "subtract": lambda lp: lora.subtract(lp, lp),
    "smaller": lambda lp: lora.resize(lp, 1),
    "larger": lambda lp: lora.resize(lp, 3, key=jax.random.key(0)),
    "singular_values": lora.singular_values,
    "effective_rank": lora.effective_rank,
    "subspace_similarity": lambda lp: lora.subspace_similarity(lp, lp, side="out"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_weight_is_formed(operation):
    leaves = tuple(name for name in LEAVES if name != "narrow")  # whose factors are as large as itself
    for path, adapter in made("standard", leaves=leaves).items():
        jaxpr = jax.make_jaxpr(OPERATIONS[operation])({path: adapter})
        assert formed(jaxpr, {path: adapter}) == []


def test_ties_svd_forms_one():
    """And the check above would see it."""
    lora_params = {"dense": made("standard")["dense"]}
    jaxpr = jax.make_jaxpr(lambda lp: lora.combine([lp], [1.0], method="ties_svd", density=0.5))(lora_params)
    assert len(formed(jaxpr, lora_params)) > 1


# Hugging Face PEFT. Its A is (rank, in) and its B (out, rank), of an embedding A (rank, in) and B (out, rank) likewise.
MODULES = {"embed": (11, 8), "dense": (8, 6)}


@functools.cache
def peft():
    with np.load(PEFT) as file:
        return dict(file)


def of_peft(group, ranks, scaling="standard"):
    adapters = []
    for i, (rank, alpha) in enumerate(zip(peft()[ranks], peft()["alphas"], strict=True)):
        variant = lora.LoRA(int(rank), float(alpha), scaling)
        adapters.append(
            {
                module: lora.Adapter(
                    {part: jnp.asarray(peft()[f"{group}/{i}/{module}/{part}"].T) for part in "AB"},
                    variant,
                    lora.Site(shape, "linear", (), (0,), (1,)),
                )
                for module, shape in MODULES.items()
            }
        )
    return adapters


def delta_of_peft(method, module):
    """Of an embedding, PEFT's ΔW is (in, out), too."""
    array = peft()[f"{method}/{module}/delta"].astype(np.float64)
    return array if module == "embed" else array.T


@pytest.mark.parametrize("method", [*METHODS, "ties_frequency"])
def test_agrees_with_peft(method, monkeypatch):
    """In float32, to rounding; what PEFT drew at random is given to both."""
    of_factors = not method.endswith("svd")
    n = sum(name.startswith(f"{method}/mask/") for name in peft())
    masks = [peft()[f"{method}/mask/{i}"] for i in range(n)]
    embed = len(masks) // 2  # PEFT's first module; of its ΔW alone, PEFT's orientation is ours
    drawn = iter([mask if i < embed and not of_factors else mask.T for i, mask in enumerate(masks)])
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.asarray(next(drawn)).reshape(shape))
    options = {}
    if method not in ("cat", "svd", "linear"):
        options |= {"density": float(peft()["density"])}
    if "dare" in method:
        options |= {"key": jax.random.key(0)}
    if method == "ties_frequency":
        options |= {"majority": "frequency"}
    method, known = method.removesuffix("_frequency"), method
    found = lora.combine(of_peft("equal", "equal"), peft()["weights"].tolist(), method=method, **options)
    assert next(drawn, None) is None
    for module in MODULES:
        assert error(delta(found[module]), delta_of_peft(known, module)) < 2e-6
        if of_factors:
            for part in "AB" if method != "cat" else "":  # of cat, weights are in A there, and in B here
                assert error(found[module].factors[part], peft()[f"{known}/{module}/{part}"].T) < 2e-6


def test_mixed_ranks_agree_with_peft():
    found = lora.combine(of_peft("mixed", "mixed"), peft()["weights"].tolist(), method="svd")
    for module in MODULES:
        assert error(delta(found[module]), delta_of_peft("mixed_svd", module)) < 2e-6


def test_rank_stabilized_adapters_are_not_too_strong():
    """PEFT's sum of three rank-stabilized adapters of rank 3 is √9 times what it should be."""
    adapters, weights = of_peft("rank_stabilized", "equal", "rank_stabilized"), peft()["weights"].tolist()
    found = lora.combine(adapters, weights)
    for module in MODULES:
        expected = total(adapters, weights, module)
        assert error(delta(found[module]), expected) < 1e-6
        assert error(delta_of_peft("rank_stabilized_cat", module), 3 * expected) < 1e-6


def dense(variant, shape=(11, 7), **site):
    return {
        "dense": lora.Adapter(
            made(lora.LoRA(2))["dense"].factors, variant, lora.Site(shape, "linear", (), (0,), (1,), **site)
        )
    }


ONE = made("standard")
FULL = {"dense": lora.Adapter({"weight": jnp.zeros((11, 7))}, lora.Full(), ONE["dense"].site)}
MERGED_ALREADY = dense(Rescaled(2))
ERRORS = {
    "method": (lambda: lora.combine([ONE], [1], method="sum"), "'sum' is none of cat, svd, linear"),
    "weights": (lambda: lora.combine([ONE, ONE], [1]), "one weight for each adapter, not 1 for 2"),
    "nothing": (lambda: lora.combine([], []), "not 0 for 0"),
    "not_finite": (lambda: lora.combine([ONE], [float("nan")]), "weights are finite"),
    "no_density": (lambda: lora.combine([ONE], [1], method="ties"), "'ties'.* needs a density"),
    "no_key": (lambda: lora.combine([ONE], [1], method="dare_linear", density=0.5), "needs a key"),
    "density": (lambda: lora.combine([ONE], [1], method="ties", density=1.5), "above 0 and at most 1"),
    "useless": (lambda: lora.combine([ONE], [1], rank=4), "'cat'.* does nothing with a rank"),
    "vote": (lambda: lora.combine([ONE], [1], method="svd", majority="frequency"), "takes no vote"),
    "rank": (lambda: lora.combine([ONE], [1], method="svd", rank=0), "a whole number, 1 or more"),
    "ranks": (
        lambda: lora.combine([ONE, made("opposite")], [1, 1], method="linear"),
        "'dense' has LoRA of rank 2, LoRA of rank 3: 'linear' takes .* `resize`",
    ),
    "not_lora": (lambda: lora.combine([made("elementwise")], [1], method="ties", density=1), "'dense' has Elementwise"),
    "changes_the_base": (lambda: lora.add(MERGED_ALREADY, ONE), "'dense': the ΔW of Rescaled .* `extract`"),
    "scale": (lambda: lora.negate(MERGED_ALREADY), "'dense': the ΔW of Rescaled is not proportional"),
    "full_and_lora": (lambda: lora.combine([ONE, FULL], [1, 1]), "'dense' has LoRA and Full"),
    "full_elsewhere": (lambda: lora.combine([FULL], [1], base={"other": 1}), "the base has no such leaf"),
    "full_shape": (lambda: lora.combine([FULL], [1], base={"dense": jnp.ones(3)}), "shape .* but the base has"),
    "sites": (
        lambda: lora.add(ONE, dense(lora.LoRA(2), (7, 11))),
        "'dense': the adapters were made for different leaves",
    ),
    "grows_without_key": (lambda: lora.resize(ONE, 3), "'dense': the rank rises from 2 to 3.* pass key="),
    "too_large": (lambda: lora.resize(ONE, 8), "'dense' .* rank 8 is above 7"),
    "resize_variant": (lambda: lora.resize(made("elementwise"), 1), "'dense': resize takes LoRA.* method='svd'"),
    "resize_rank": (lambda: lora.resize(ONE, 0), "a whole number, 1 or more"),
    "extract_variant": (lambda: lora.extract(base(), tuned(), {"dense": Elementwise()}), "'dense': extract makes LoRA"),
    "extract_rank": (lambda: lora.extract(base(), tuned(), {"dense": lora.LoRA(8)}), "'dense' .* above 7"),
    "extract_shapes": (lambda: lora.extract({"w": jnp.ones(3)}, {"w": jnp.ones(4)}, 1), "'w' has shape"),
    "extract_paths": (lambda: lora.extract({"w": jnp.ones(3)}, {"v": jnp.ones(3)}, 1), "'w' is missing in tuned"),
    "extract_finite": (
        lambda: lora.extract({"w": jnp.ones((3, 3))}, {"w": jnp.full((3, 3), jnp.inf)}, 1),
        "'w': values that are not finite",
    ),
    "spectrum": (lambda: lora.singular_values(FULL), "'dense': the ΔW of Full is no product A·B"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_where_what_and_what_to_do(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()

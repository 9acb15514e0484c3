"""`scale`, `negate`, `add`, `subtract`, `resize`, `extract`: laws over leaves of every shape, against dense float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, formed, normal, randomized
from leaves import LEAVES, VARIANTS, Elementwise, Rescaled, as_matrices, base, best, delta, made, placed

import lora_jax as lora


@pytest.mark.parametrize("variant", VARIANTS)
def test_scale_negate_add_subtract(variant):
    lora_params, other = made(variant), made("rank_stabilized", seed=5)
    for path in ("heads", "conv"):
        adapter = lora_params[path]
        expected, second = delta(adapter), delta(other[path])
        scaled = lora.scale({path: adapter}, 0.3)[path]
        assert error(delta(scaled), 0.3 * expected) < 1e-6
        assert jax.tree.structure(scaled) == jax.tree.structure(adapter)
        negated = lora.negate({path: adapter})
        np.testing.assert_array_equal(delta(negated[path]), -expected)
        assert np.abs(delta(lora.add({path: adapter}, negated)[path])).max() < 1e-6
        both = {path: adapter}, {path: other[path]}
        assert error(delta(lora.add(*both)[path]), expected + second) < 1e-6
        assert error(delta(lora.subtract(*both)[path]), expected - second) < 1e-6


def test_scale_leaves_frozen_factors_alone():
    lora_params = made("diagonal")
    scaled = lora.scale(lora_params, 2.0)["heads"]
    assert scaled.factors["A"] is lora_params["heads"].factors["A"]
    np.testing.assert_array_equal(scaled.factors["d"], 2 * lora_params["heads"].factors["d"])


def of_variant(variant):
    """A base of zeros and random adapters of two leaves, with what these share."""
    params = {"up": jnp.zeros((8, 12)), "down": jnp.zeros((12, 8))}
    return params, randomized(lora.split(jax.random.key(0), params, {".*": variant})[1], scale=0.5)


@pytest.mark.parametrize("variant", [lora.VeRA(3), lora.LoKr(2, factor=2), lora.LoHa(2), lora.AdaLoRA(2)], ids=repr)
def test_scale_knows_what_multiplies_delta(variant):
    """Factors that leaves share stay as they are; and ΔW may split the weight's axes."""
    params, lora_params = of_variant(variant)
    whole, half = (lora.merge(params, lp) for lp in (lora_params, lora.scale(lora_params, 0.5)))
    for path in params:
        assert error(half[path], 0.5 * whole[path]) < 1e-6


def test_what_leaves_share_takes_part():
    params, lora_params = of_variant(lora.VeRA(3))
    whole, both = (lora.merge(params, lp) for lp in (lora_params, lora.add(lora_params, lora_params)))
    for path in params:
        assert error(both[path], 2 * whole[path]) < 1e-5
    assert {*lora.combine([lora_params], [1], method="svd", rank=2)} == {*params}
    with pytest.raises(ValueError, match="'down': resize takes LoRA.* method='svd'"):
        lora.resize(lora_params, 2)
    for path, values in lora.singular_values(lora_params).items():
        expected = np.linalg.svd(whole[path], compute_uv=False)[:3]
        np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert {*lora.amplification(params, lora_params)} == {*params}


def test_resize_keeps_a_frozen_a_frozen():
    params, lora_params = of_variant(lora.LoRAFA(4, alpha=2))
    merged = lora.merge(params, lora_params)
    for rank, key in ((2, None), (6, jax.random.key(0))):
        found = lora.resize(lora_params, rank, key=key)
        assert {type(adapter.variant) for adapter in found.values()} == {lora.LoRAFA}
        for path, adapter in found.items():
            u, s, vt = np.linalg.svd(merged[path], full_matrices=False)
            expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert error(delta(adapter), expected) < 1e-5
    assert lora.combine([lora_params], [1], method="linear")["up"].variant.rank == 4


@functools.cache
def resized(variant, rank):
    return jax.jit(functools.partial(lora.resize, rank=rank))(made(variant), key=jax.random.key(7))


@pytest.mark.parametrize(
    ("variant", "path"), [(variant, path) for variant in ("rank_stabilized", "opposite") for path in LEAVES]
)
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
        grown = jax.jit(functools.partial(lora.resize, rank=6))(old, key=jax.random.key(7))
        for path, adapter in grown.items():
            assert error(delta(adapter), delta(old[path])) < 1e-7
            rank = old[path].variant.rank
            np.testing.assert_array_equal(adapter.factors["A"][..., :rank], old[path].factors["A"])
            new = np.asarray(adapter.factors["A"][..., rank:])
            inputs = np.prod(adapter.site.sizes()[1])
            assert new.shape[-1] == 6 - rank
            assert 0.6 < new.std() * np.sqrt(inputs) < 1.6  # as at the start of training
        frozen = {path: base()[path] for path in leaves}

        @jax.jit
        @jax.grad
        def gradients(lora_params, frozen=frozen):
            return sum(jnp.sum(x**2) for x in lora.merge(frozen, lora_params).values())

        for path, adapter in gradients(grown).items():
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
        found = lora.combine(made, [2.0, 0.5], method=method, base=params)
        np.testing.assert_allclose(found["bias"].factors["weight"], [3.0, 3.0, 2.0])
    ties = lora.combine(made, [1.0, 1.0], method="ties", density=1.0, base=params)
    np.testing.assert_allclose(ties["bias"].factors["weight"], [2.0, 4.0, 0.0])
    np.testing.assert_allclose(lora.negate(made[0], base=params)["bias"].factors["weight"], [0.0, 2.0, -6.0])
    np.testing.assert_allclose(lora.subtract(*made, base=params)["bias"].factors["weight"], [2.0, 0.0, 2.0])
    assert lora.resize(made[0], 4) == made[0]
    for call in (lambda: lora.combine(made, [1, 1]), lambda: lora.scale(made[0], 2.0)):
        with pytest.raises(ValueError, match="'bias' trains in Full, .* pass base="):
            call()


def test_bfloat16_factors_stay_so():
    low = {"heads": made(lora.LoRA(2, dtype="bfloat16"))["heads"]}
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
    mixed = lora.combine([low, {"heads": made("standard")["heads"]}], [1, 1])
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


def one(variant="standard"):
    return {"dense": made(variant)["dense"]}


ERRORS = {
    "scale": (lambda: lora.negate(one(Rescaled(2))), "'dense': the ΔW of Rescaled is not proportional"),
    "grows_without_key": (lambda: lora.resize(one(), 3), "'dense': the rank rises from 2 to 3.* pass key="),
    "too_large": (lambda: lora.resize(one(), 8), "'dense' .* rank 8 is above 7"),
    "resize_variant": (lambda: lora.resize(one("diagonal"), 1), "'dense': resize takes LoRA.* method='svd'"),
    "resize_rank": (lambda: lora.resize(one(), 0), "a whole number, 1 or more"),
    "extract_variant": (lambda: lora.extract(base(), tuned(), {"dense": Elementwise()}), "'dense': extract makes LoRA"),
    "extract_rank": (lambda: lora.extract(base(), tuned(), {"dense": lora.LoRA(8)}), "'dense' .* above 7"),
    "extract_shapes": (lambda: lora.extract({"w": jnp.ones(3)}, {"w": jnp.ones(4)}, 1), "'w' has shape"),
    "extract_paths": (lambda: lora.extract({"w": jnp.ones(3)}, {"v": jnp.ones(3)}, 1), "'w' is missing in tuned"),
    "extract_finite": (
        lambda: lora.extract({"w": jnp.ones((3, 3))}, {"w": jnp.full((3, 3), jnp.inf)}, 1),
        "'w' has values in tuned that are not finite",
    ),
    "extract_finite_in_full": (
        lambda: lora.extract({"b": jnp.zeros(3)}, {"b": jnp.full(3, jnp.nan)}, {"b": lora.Full()}),
        "'b' has values in tuned that are not finite",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_where_what_and_what_to_do(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()

"""Diagnostics from factors, against dense singular value decompositions in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, formed, normal
from leaves import LEAVES, Rescaled, as_matrices, base, delta, full, made

import lora_jax as lora

RANK = {"standard": 2, "rank_stabilized": 3, "elementwise": 4}


def one(path):
    return made("standard")[path]


def dense_svd(adapter, path):
    return np.linalg.svd(as_matrices(delta(adapter), path), full_matrices=False)


@functools.cache
def measured(variant):
    params, lora_params = base(), made(variant)
    return jax.jit(lambda lp: (lora.singular_values(lp), lora.effective_rank(lp), lora.amplification(params, lp)))(
        lora_params
    )


@pytest.mark.parametrize("variant", RANK)
@pytest.mark.parametrize("path", LEAVES)
def test_spectrum_rank_and_amplification(path, variant):
    values, effective, amplified = (found[path] for found in measured(variant))
    rank = min(RANK[variant], values.shape[-1])
    u, s, vt = dense_svd(made(variant)[path], path)
    u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    assert error(values[..., :rank], s) < 1e-5
    p = s / s.sum(-1, keepdims=True)
    np.testing.assert_allclose(effective, np.exp(-(p * np.log(p)).sum(-1)), rtol=1e-5)
    weight = as_matrices(np.asarray(base()[path], np.float64), path)
    projected = np.swapaxes(u, -2, -1) @ weight @ np.swapaxes(vt, -2, -1)
    expected = np.linalg.norm(s, axis=-1) / np.linalg.norm(projected, axis=(-2, -1))
    np.testing.assert_allclose(amplified, expected, rtol=1e-4)


@pytest.mark.parametrize("side", ["A", "B", "in", "out"])
def test_subspace_similarity(side):
    first, second = made("rank_stabilized"), made("standard", seed=3)
    found = jax.jit(functools.partial(lora.subspace_similarity, side=side))(first, second)

    def directions(adapter, path):
        if side in ("in", "out"):
            u, _, vt = dense_svd(adapter, path)
            rank = adapter.variant.rank
            return u[..., :rank] if side == "in" else np.swapaxes(vt[..., :rank, :], -2, -1)
        x = np.asarray(adapter.factors[side], np.float64)
        batch = len(adapter.site.batch_axes)
        if side == "A":
            return np.linalg.svd(x.reshape(*x.shape[:batch], -1, x.shape[-1]), full_matrices=False)[0]
        vt = np.linalg.svd(x.reshape(*x.shape[: batch + 1], -1), full_matrices=False)[2]
        return np.swapaxes(vt, -2, -1)

    for path in LEAVES:
        u, v = directions(first[path], path), directions(second[path], path)
        assert found[path].shape == (*u.shape[:-2], 3, 2)
        for i in range(1, 4):
            for j in range(1, 3):
                overlap = np.swapaxes(u[..., :i], -2, -1) @ v[..., :j]
                expected = np.linalg.norm(overlap, axis=(-2, -1)) ** 2 / min(i, j)
                np.testing.assert_allclose(found[path][..., i - 1, j - 1], expected, atol=1e-5)


def test_similarity_of_an_adapter_with_itself_is_one_on_the_diagonal():
    lora_params = {"heads": made("rank_stabilized")["heads"]}
    for similarity in lora.subspace_similarity(lora_params, lora_params).values():
        np.testing.assert_allclose(np.diagonal(similarity, axis1=-2, axis2=-1), 1, rtol=1e-5)
        assert (np.asarray(similarity) < 1 + 1e-5).all()


def test_the_sides_of_delta_do_not_depend_on_its_factors():
    """A and B turned against each other are the same ΔW; A's own directions change."""
    adapter = made("rank_stabilized")["dense"]
    (a, b), turn = adapter.factors.values(), normal(3, 3)
    factors = {"A": a @ turn, "B": jnp.linalg.inv(turn) @ b}
    lora_params, turned = {"dense": adapter}, {"dense": lora.Adapter(factors, adapter.variant, adapter.site)}
    for side, same in (("in", True), ("out", True), ("A", False)):
        similarity = lora.subspace_similarity(lora_params, turned, side=side)["dense"]
        assert np.allclose(np.diagonal(similarity), 1, atol=1e-4) == same


def test_what_has_not_trained_has_no_rank_and_amplifies_nothing():
    params = {"w": jnp.ones((8, 6))}
    _, fresh = lora.split(jax.random.key(0), params, {"w": lora.LoRA(3)})
    assert float(lora.effective_rank(fresh)["w"]) == 0
    assert float(lora.amplification(params, fresh)["w"]) == 0


def test_directions_without_strength_do_not_count():
    """An adapter that is grown, or added to itself, is as it was."""
    params, lora_params = {"dense": base()["dense"]}, {"dense": made("standard")["dense"]}
    for larger in (lora.resize(lora_params, 5, key=jax.random.key(0)), lora.combine([lora_params] * 2, [0.5, 0.5])):
        for of in (lora.effective_rank, functools.partial(lora.amplification, params)):
            np.testing.assert_allclose(jax.jit(of)(larger)["dense"], jax.jit(of)(lora_params)["dense"], rtol=1e-4)


def test_leaves_that_train_themselves_are_left_out():
    lora_params = {**full(), "conv": one("conv")}
    assert list(lora.singular_values(lora_params)) == ["conv"]
    assert list(lora.subspace_similarity(lora_params, lora_params)) == ["conv"]
    assert list(lora.amplification(base(), lora_params)) == ["conv"]


def test_amplification_forms_no_weight():
    params = base()
    for path, adapter in made("standard").items():
        if path != "narrow":
            jaxpr = jax.make_jaxpr(functools.partial(lora.amplification, params))({path: adapter})
            assert formed(jaxpr, {path: adapter}) == []


ERRORS = {
    "side": (lambda: lora.subspace_similarity(full(), full(), side="left"), "'left' is none of 'A', 'B', 'in', 'out'"),
    "disjoint": (lambda: lora.subspace_similarity({"a": one("conv")}, {"b": one("conv")}), "no path in common"),
    "sizes": (lambda: lora.subspace_similarity({"a": one("conv")}, {"a": one("dense")}), "'a': .* different sizes"),
    "rescaled": (
        lambda: lora.singular_values(made(Rescaled(2), leaves=("dense",))),
        "'dense': the ΔW of Rescaled is no product A·B",
    ),
    "path": (lambda: lora.amplification({"densee": 1}, {"dense": one("dense")}), "'dense'; close matches: densee"),
    "shape": (lambda: lora.amplification({"dense": jnp.ones((2, 2))}, {"dense": one("dense")}), "'dense': .* shape"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()

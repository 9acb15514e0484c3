"""`combine`: laws over leaves of every shape, against dense float64 linear algebra and Hugging Face PEFT."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import error, normal
from leaves import LEAVES, VARIANTS, Rescaled, as_matrices, base, best, delta, full, made

import lora_jax as lora
from lora_jax.algebra import task_arithmetic
from lora_jax.algebra.combine import METHODS

PEFT = Path(__file__).parent / "fixtures" / "peft_combinations.npz"
WEIGHTS = [0.7, -0.4, 1.2, 0.5, -2.0]


def one(variant="standard"):
    return {"dense": made(variant)["dense"]}


def several():
    """One adapter of each variant; each lacks the leaf of its number."""
    names = list(LEAVES)
    return [
        {path: adapter for path, adapter in made(variant, seed=i).items() if path != names[i]}
        for i, variant in enumerate(VARIANTS)
    ]


def total(adapters, weights, path):
    parts = [w * delta(lp[path]) for lp, w in zip(adapters, weights, strict=True) if path in lp]
    return np.sum(parts, axis=0)


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


@pytest.mark.parametrize(("path", "rank"), [(path, rank) for path in LEAVES for rank in (1, 4, 40)])
def test_svd_is_the_best_of_its_rank(path, rank):
    """At a rank that suffices, the sum itself; and never of more rank than the leaf can have."""
    found, expected = combined("svd", rank)[path], total(several(), WEIGHTS, path)
    assert error(as_matrices(delta(found), path), best(expected, path, rank)) < 1e-5
    assert found.variant.rank == min(rank, found.site.max_rank)


def test_svd_without_a_rank_keeps_the_largest():
    adapters = [one("standard"), one("opposite")]
    assert lora.combine(adapters, [1, 1], method="svd")["dense"].variant.rank == 3
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
    adapters = [{"heads": made("standard", seed=seed)["heads"]} for seed in (0, 1)]
    for method in ("svd", "linear", "magnitude_prune", "ties", "ties_svd"):
        options = {"density": 0.4} if "prune" in method or "ties" in method else {}
        options |= {"rank": 2} if "svd" in method else {}
        combine = jax.jit(functools.partial(lora.combine, method=method, **options))
        whole = combine(adapters, [0.5, 2.0])
        for layer in (0, 3):
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
            one = combine(own, [0.5, 2.0])["heads"]
            assert error(delta(one), delta(whole["heads"])[layer]) < 1e-5, method


@pytest.mark.parametrize("method", [m for m in METHODS if "svd" in m and m != "svd"])
def test_svd_of_pruned_deltas(method):
    """What these make of ΔWs is checked against PEFT; here, that they take leaves and variants of every kind."""
    options = {"density": 1.0, **({"key": jax.random.key(0)} if "dare" in method else {})}
    adapters = [
        {path: made(variant)[path] for path in ("heads", "conv")}
        for variant in ("standard", "elementwise", "rank_stabilized")
    ]
    combine = jax.jit(functools.partial(lora.combine, method=method, rank=3, **options))
    for path, found in combine(adapters, [1.0, -2.0, 0.5]).items():
        assert found.variant.rank == 3
        if "ties" not in method:  # of density 1, the sum
            expected = total(adapters, [1.0, -2.0, 0.5], path)
            assert error(as_matrices(delta(found), path), best(expected, path, 3)) < 1e-5


def test_dare_keeps_the_expectation():
    tensor = jnp.ones(40_000)
    kept = task_arithmetic.at_random(jax.random.key(0), tensor, 0.2)
    assert set(np.unique(kept)) == {0, 5}
    assert float(kept.mean()) == pytest.approx(1, abs=0.05)
    both = {path: made("standard")[path] for path in ("conv", "dense")}
    a, b = (lora.combine([both], [1.0], method="dare_linear", density=0.5, key=jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(a["dense"].factors["A"], b["dense"].factors["A"])
    alone = {"conv": made("standard")["conv"]}
    alone = lora.combine([alone], [1.0], method="dare_linear", density=0.5, key=jax.random.key(0))
    np.testing.assert_array_equal(alone["conv"].factors["A"], a["conv"].factors["A"])


def test_weights_may_be_traced_and_have_gradients():
    adapters = [one("standard"), one("opposite")]
    target = normal(11, 7)

    def inner(weights):
        return jnp.vdot(
            lora.merge({"dense": jnp.zeros((11, 7))}, lora.combine(adapters, weights))["dense"],
            target,
        )

    grads = jax.jit(jax.grad(inner))(jnp.array([0.3, -1.0]))
    expected = [np.vdot(delta(lp["dense"]), np.asarray(target, np.float64)) for lp in adapters]
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


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
        options |= {} if of_factors else {"rank": int(peft()["rank"])}
    if "dare" in method:
        options |= {"key": jax.random.key(0)}
    if method == "ties_frequency":
        options |= {"majority": "frequency"}
    method, known = method.removesuffix("_frequency"), method
    combine = functools.partial(lora.combine, method=method, **options)
    combine = combine if masks else jax.jit(combine)  # which sorts paths, and masks are in PEFT's order
    found = combine(of_peft("equal", "equal"), peft()["weights"])
    assert next(drawn, None) is None
    for module in MODULES:
        assert error(delta(found[module]), delta_of_peft(known, module)) < 2e-6
        if of_factors:
            for part in "AB" if method != "cat" else "":  # of cat, weights are in A there, and in B here
                assert error(found[module].factors[part], peft()[f"{known}/{module}/{part}"].T) < 2e-6


def test_mixed_ranks_agree_with_peft():
    found = jax.jit(functools.partial(lora.combine, method="svd"))(of_peft("mixed", "mixed"), peft()["weights"])
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


def turned():
    """The same factors, for a leaf of another shape."""
    adapter = made("standard")["dense"]
    return {"dense": lora.Adapter(adapter.factors, adapter.variant, lora.Site((7, 11), "linear", (), (0,), (1,)))}


ERRORS = {
    "method": (lambda: lora.combine([one()], [1], method="sum"), "'sum' is none of cat, svd, linear"),
    "weights": (lambda: lora.combine([one(), one()], [1]), "one weight for each adapter, not 1 for 2"),
    "nothing": (lambda: lora.combine([], []), "not 0 for 0"),
    "not_finite": (lambda: lora.combine([one()], [float("nan")]), "weights are finite"),
    "no_density": (lambda: lora.combine([one()], [1], method="ties"), "'ties'.* needs a density"),
    "no_key": (lambda: lora.combine([one()], [1], method="dare_linear", density=0.5), "needs a key"),
    "density": (lambda: lora.combine([one()], [1], method="ties", density=1.5), "above 0 and at most 1"),
    "useless": (lambda: lora.combine([one()], [1], rank=4), "'cat'.* does nothing with a rank"),
    "vote": (lambda: lora.combine([one()], [1], method="svd", majority="frequency"), "takes no vote"),
    "rank": (lambda: lora.combine([one()], [1], method="svd", rank=0), "a whole number, 1 or more"),
    "ranks": (
        lambda: lora.combine([one(), one("opposite")], [1, 1], method="linear"),
        "'dense' has LoRA of rank 2, LoRA of rank 3: 'linear' takes .* `resize`",
    ),
    "not_lora": (lambda: lora.combine([one("elementwise")], [1], method="ties", density=1), "'dense' has Elementwise"),
    "not_plain": (lambda: lora.combine([one("diagonal")], [1], method="linear"), "'dense' has Diagonal of rank 2"),
    "changes_the_base": (lambda: lora.add(one(Rescaled(2)), one()), "'dense': the ΔW of Rescaled .* `extract`"),
    "full_and_lora": (lambda: lora.combine([one(), full()], [1, 1]), "'dense' has LoRA and Full"),
    "full_elsewhere": (lambda: lora.combine([full()], [1], base={"other": 1}), "the base has no such leaf"),
    "full_shape": (lambda: lora.combine([full()], [1], base={"dense": jnp.ones(3)}), "shape .* but the base has"),
    "sites": (lambda: lora.add(one(), turned()), "'dense': the adapters were made for different leaves"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_where_what_and_what_to_do(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()

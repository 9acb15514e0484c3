"""How factors begin: base and factors add up to the weight, and the factors are what their papers say."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import all_adaptable, error, normal
from zoo import ZOO

import lora_jax as lora
from lora_jax.initial.names import FROM_DATA, NAMED
from lora_jax.matrices import to_matrices

NAMES = [*NAMED, "pissa_niter_2"]
# name: a weight, and its batch, in and out axes
LEAVES = {
    "linear": (normal(12, 8, seed=1), (), (0,), (1,)),
    "out_in": (normal(12, 8, seed=2), (), (1,), (0,)),
    "wide": (normal(6, 20, seed=3), (), (0,), (1,)),
    "heads": (normal(12, 4, 3, seed=4), (), (0,), (1, 2)),
    "stacked": (normal(3, 12, 8, seed=5), (0,), (1,), (2,)),
    "stacked_last": (normal(12, 8, 3, seed=6), (2,), (0,), (1,)),
    "experts": (normal(2, 3, 12, 8, seed=7), (0, 1), (2,), (3,)),
    "conv": (normal(3, 3, 4, 8, seed=8), (), (0, 1, 2), (3,)),
}


def split(weight, axes, variant, key=0):
    batch, inner, outer = axes
    rules = {"w": variant.at(batch_axes=batch, in_axes=inner, out_axes=outer)}
    return jax.jit(lambda weight: lora.split(jax.random.key(key), {"w": weight}, rules))(weight)


def parts(lora_params):
    """s·A·B of the leaf "w" as matrices (*batch, in, out), in float64."""
    adapter = lora_params["w"]
    delta = lora.merge({"w": jnp.zeros(adapter.site.shape)}, lora_params)["w"]
    return np.asarray(to_matrices(delta, adapter.site), np.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_base_and_factors_add_up_to_the_weight(leaf, name):
    weight, *axes = LEAVES[leaf]
    frozen, lora_params = split(weight, axes, lora.LoRA(rank=4, alpha=-3, init=name))
    assert error(lora.merge(frozen, lora_params)["w"], weight) < 3e-7
    assert frozen["w"].dtype == weight.dtype and frozen["w"].shape == weight.shape
    assert all(bool(factor.any()) for factor in lora_params["w"].factors.values())
    assert lora_params["w"].variant.init == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_base_is_rounded_once(name, dtype):
    """The base is within half a unit in its last place of W - s·A·B, with A and B as they are kept."""
    weight = normal(64, 32, seed=1).astype(jnp.bfloat16)
    variant = lora.LoRA(rank=4, alpha=8, init=name, dtype=dtype)
    frozen, lora_params = split(weight, ((), (0,), (1,)), variant)
    a, b = (np.asarray(x, np.float64) for x in lora_params["w"].factors.values())
    exact = np.asarray(weight, np.float64) - 2 * a @ b
    off = np.abs(np.asarray(frozen["w"], np.float64) - exact)
    assert (off <= 2**-8 * np.abs(exact) + 1e-6).all()
    assert frozen["w"].dtype == jnp.bfloat16
    assert error(lora.merge(frozen, lora_params)["w"], weight) < 2**-8


@pytest.mark.parametrize(("model", "name"), [("by_hand", "pissa"), ("linen", "olora"), ("nnx", "orthogonal")])
def test_a_function_starts_as_it_is(model, name):
    loss, params, batch = ZOO[model]()
    sites = lora.sites(loss, params, *batch)
    split = functools.partial(lora.split, rules=all_adaptable(lora.LoRA(2, alpha=4, init=name)), sites=sites)
    frozen, lora_params = split(jax.random.key(3), params)
    found = jax.jit(lambda frozen, lp: lora.lift(loss)(lora.attach(frozen, lp), *batch))(frozen, lora_params)
    assert float(found) == pytest.approx(float(jax.jit(loss)(params, *batch)), rel=1e-5)


@pytest.mark.parametrize("leaf", LEAVES)
def test_pissa_is_the_best_approximation_of_its_rank(leaf):
    weight, *axes = LEAVES[leaf]
    _, lora_params = split(weight, axes, lora.LoRA(rank=3, alpha=2, init="pissa"))
    matrices = np.asarray(to_matrices(weight, lora_params["w"].site), np.float64)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    assert error(parts(lora_params), (u[..., :3] * s[..., None, :3]) @ vt[..., :3, :]) < 1e-5
    batch, inner, outer = axes
    a, b = (lora_params["w"].factors[name] for name in "AB")
    lengths = (jnp.linalg.norm(a.reshape(*a.shape[: len(batch)], -1, 3), axis=-2),)
    lengths += (jnp.linalg.norm(b.reshape(*b.shape[: len(batch)], 3, -1), axis=-1),)
    assert error(*lengths) < 1e-5  # each singular value is shared evenly


def test_the_randomized_decomposition_is_close_to_the_exact_one():
    u, _ = jnp.linalg.qr(normal(200, 150, seed=1))
    v, _ = jnp.linalg.qr(normal(150, 150, seed=2))
    weight = (u * 0.9 ** jnp.arange(150.0)) @ v.T
    exact = parts(split(weight, ((), (0,), (1,)), lora.LoRA(8, init="pissa"))[1])
    lost = np.linalg.norm(np.asarray(weight) - exact)
    errors = []
    for n in (0, 2, 8):
        found = parts(split(weight, ((), (0,), (1,)), lora.LoRA(8, init=f"pissa_niter_{n}"))[1])
        errors.append(np.linalg.norm(np.asarray(weight) - found) / lost - 1)
        assert np.linalg.matrix_rank(found, tol=1e-3) == 8
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 1e-2
    assert errors[2] < 1e-5


@pytest.mark.parametrize("leaf", LEAVES)
def test_olora_is_the_weight_along_orthonormal_directions(leaf):
    weight, *axes = LEAVES[leaf]
    _, lora_params = split(weight, axes, lora.LoRA(rank=3, alpha=6, init="olora"))
    adapter = lora_params["w"]
    batch, inner, outer = adapter.site.sizes()
    b = np.asarray(adapter.factors["B"], np.float64).reshape(*batch, 3, -1)
    bt = np.swapaxes(b, -1, -2)
    matrices = np.asarray(to_matrices(weight, adapter.site), np.float64)
    assert error(b @ bt, np.broadcast_to(np.eye(3), (*batch, 3, 3))) < 1e-5
    assert error(parts(lora_params), 2 * matrices @ bt @ b) < 1e-5
    q, _ = np.linalg.qr(np.swapaxes(matrices, -1, -2))
    assert error(bt @ b, q[..., :3] @ np.swapaxes(q[..., :3], -1, -2)) < 1e-5


def test_orthogonal_factors_are_neither_zero_nor_a_change():
    weight, *axes = LEAVES["linear"]
    _, lora_params = split(weight, axes, lora.LoRA(rank=4, init="orthogonal"))
    a, b = lora_params["w"].factors["A"], lora_params["w"].factors["B"]
    assert float(jnp.abs(a @ b).max()) < 1e-7
    assert 0.02 < float(a.std()) < 0.2 and 0.02 < float(b.std()) < 0.2
    with pytest.raises(ValueError, match="rank 3 is odd"):
        split(weight, axes, lora.LoRA(rank=3, init="orthogonal"))


def test_a_leaf_begins_by_its_key_and_its_path_alone():
    params = {"w": LEAVES["linear"][0], "v": LEAVES["wide"][0]}
    variant = lora.LoRA(rank=2, init="pissa_niter_1")
    together = lora.split(jax.random.key(0), params, {".*": variant})[1]
    alone = lora.split(jax.random.key(0), params, {"v": variant})[1]
    np.testing.assert_array_equal(together["v"].factors["A"], alone["v"].factors["A"])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pisa", "none of normal, uniform, .*pissa"),
        ("pissa_niter_", "none of normal"),
        *((name, f"rules that lora_jax.{name} returns") for name in FROM_DATA),
    ],
)
def test_an_unknown_name_is_an_error(init, message):
    with pytest.raises(ValueError, match=message):
        split(*_first(), lora.LoRA(rank=2, init=init))


def _first():
    weight, *axes = LEAVES["linear"]
    return weight, axes


@pytest.mark.parametrize("name", NAMES)
def test_a_leaf_without_values_has_no_decomposition(name):
    params, rules = {"w": jax.ShapeDtypeStruct((8, 4), "float32")}, {"w": lora.LoRA(rank=2, init=name)}
    with pytest.raises(ValueError, match=f"'w'.*init='{name}' reads the leaf.*eval_shape"):
        lora.split(jax.random.key(0), params, rules)
    frozen, lora_params = jax.eval_shape(lambda params: lora.split(jax.random.key(0), params, rules), params)
    assert frozen["w"].shape == (8, 4) and lora_params["w"].factors["A"].shape == (8, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(lora.Initialization):
    array: jax.Array

    def start(self, key, weight, site, rank, scale):
        return lora.Start(self.array)


def test_an_adapter_keeps_no_array_that_it_began_from():
    array = normal(12, 2)
    gone = weakref.ref(array)
    frozen, lora_params = split(*_first(), lora.LoRA(rank=2, init=Given(array)))
    again = lora.LoRA(rank=2, init=lambda key, shape, dtype, held=array: jnp.zeros(shape, dtype))
    _, drawn = split(*_first(), again)
    step = jax.jit(lambda lp: lora.merge(frozen, lp))
    step(lora_params)
    assert lora_params["w"].variant.init == "Given"
    assert drawn["w"].variant.init == "<lambda>"
    assert jax.tree.structure(lora_params) == jax.tree.structure(drawn) and step._cache_size() == 1
    lora_params["w"].factors.clear()
    del array, again
    gc.collect()
    assert gone() is None


def test_an_initialization_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"'w'.*init='Given'.*\(11, 2\)"):
        split(*_first(), lora.LoRA(rank=2, init=Given(normal(11, 2))))


def quantized(x):
    """The nearest value of a grid: so each half of LoftQ's rounds can only lessen what is lost."""
    return jnp.round(2 * x) / 2


@pytest.mark.parametrize("leaf", LEAVES)
def test_loftq_mends_what_quantization_loses(leaf):
    weight, *axes = LEAVES[leaf]
    seen = []

    def quantize(x):
        seen.append(x.shape)
        return quantized(x)

    lost = [error(quantized(weight), weight)]
    for iterations in (1, 5):
        variant = lora.LoRA(rank=4, alpha=2)
        rules = lora.loftq(
            quantize,
            lambda *_, v=variant: v.at(batch_axes=axes[0], in_axes=axes[1], out_axes=axes[2]),
            iterations=iterations,
        )
        frozen, lora_params = lora.split(jax.random.key(0), {"w": weight}, rules)
        assert bool((frozen["w"] == quantized(frozen["w"])).all())
        lost.append(error(lora.merge(frozen, lora_params)["w"], weight))
    assert set(seen) == {weight.shape} and len(seen) == 6
    assert lost[2] <= lost[1] < lost[0]


def test_loftq_leaves_other_variants_as_ruled():
    params = {"w": LEAVES["linear"][0], "b": normal(8)}
    rules = lora.loftq(quantized, {"w": lora.LoRA(rank=2), "b": lora.Full()})
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    assert (lora_params["w"].variant.init, type(lora_params["b"].variant)) == ("loftq", lora.Full)
    with pytest.raises(ValueError, match="1 or more"):
        lora.loftq(quantized, rules, iterations=0)
    with pytest.raises(ValueError, match=r"'w'.*shape \(12,\) for a leaf of shape \(12, 8\)"):
        lora.split(jax.random.key(0), params, lora.loftq(lambda x: x[:, 0], {"w": lora.LoRA(rank=2)}))
    for quantize, message in ((lambda x: (x, 1), "a tuple for a leaf"), (lambda x: x / 0, "not finite")):
        with pytest.raises(ValueError, match=f"'w'.*{message}"):
            lora.split(jax.random.key(0), params, lora.loftq(quantize, {"w": lora.LoRA(rank=2)}))
    with pytest.raises(ValueError, match="differ by more than rank 2 holds"):
        lora.relative_to(params, frozen, lora_params)


@pytest.mark.parametrize(
    ("leaf", "name", "dtype"),
    [
        *((leaf, name, "float32") for leaf in ("heads", "stacked_last", "conv") for name in NAMES),
        ("linear", "pissa", "bfloat16"),
    ],
)
def test_an_export_merges_into_the_original_base(leaf, name, dtype):
    weight, *axes = LEAVES[leaf]
    weight = weight.astype(dtype)
    variant = lora.LoRA(rank=2, alpha=-6, init=name, scaling="rank_stabilized")
    frozen, lora_params = split(weight, axes, variant)
    trained = jax.tree.map(lambda x: x + normal(*x.shape, seed=9, scale=0.1), lora_params)
    exported = lora.relative_to({"w": weight}, frozen, trained)
    assert exported["w"].variant.scale == pytest.approx(variant.scale)
    expected = lora.merge(frozen, trained)["w"]
    # The terms of either sum are larger than it.
    size = sum(float(jnp.linalg.norm(x.astype("float32").ravel())) for x in (weight, frozen["w"], parts(trained)))
    size /= float(jnp.linalg.norm(expected.astype("float32").ravel()))
    assert error(lora.merge({"w": weight}, exported)["w"], expected) < 3 * size * float(jnp.finfo(dtype).eps)
    assert name == "orthogonal" or error(lora.merge({"w": weight}, trained)["w"], expected) > 0.1


def test_an_export_of_what_left_the_base_alone_is_itself():
    weight, axes = _first()
    frozen, lora_params = split(weight, axes, lora.LoRA(rank=2))
    assert lora.relative_to({"w": weight}, frozen, lora_params)["w"] is lora_params["w"]
    with pytest.raises(ValueError, match="params has no leaf"):
        lora.relative_to({}, frozen, lora_params)
    _, full = lora.split(jax.random.key(0), {"w": weight}, {"w": lora.Full()})
    with pytest.raises(ValueError, match="of Full"):
        lora.relative_to({"w": weight}, {"w": weight + 1}, full)


def test_an_export_leaves_what_leaves_share():
    params = {"w": LEAVES["linear"][0], "v": LEAVES["wide"][0]}
    rules = {"w": lora.LoRA(rank=2, init="pissa"), "v": lora.VeRA(3)}
    frozen, lora_params = lora.split(jax.random.key(0), params, rules)
    exported = lora.relative_to(params, frozen, lora_params)
    assert {*exported} == {*lora_params}
    assert error(lora.merge(params, exported), lora.merge(frozen, lora_params)) < 1e-6


def test_an_export_of_bfloat16_factors_is_not_rounded():
    """A·B and A₀·B₀ nearly cancel, so that each needs more digits than what they come to."""
    weight, axes = _first()
    frozen, lora_params = split(weight, axes, lora.LoRA(rank=2, init="pissa", dtype="bfloat16"))
    exported = lora.relative_to({"w": weight}, frozen, lora_params)
    assert {x.dtype.name for x in exported["w"].factors.values()} == {exported["w"].variant.dtype} == {"float32"}
    assert error(lora.merge({"w": weight}, exported)["w"], lora.merge(frozen, lora_params)["w"]) < 1e-6


def test_an_export_takes_no_quantization_for_rounding():
    """Of 8 bits, under a bfloat16 base, it is not much more than that."""
    params = {"w": normal(128, 128).astype("bfloat16")}
    rules = lora.loftq(lambda x: jnp.round(x * 127 / abs(x).max(0)) * abs(x).max(0) / 127, {"w": lora.LoRA(rank=2)})
    with pytest.raises(ValueError, match="differ by more than rank 2 holds"):
        lora.relative_to(params, *lora.split(jax.random.key(0), params, rules))

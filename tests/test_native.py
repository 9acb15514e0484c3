"""The library's own file: the same bits back, or an error that says what does not fit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.flax
from checks import randomized

import lora_jax as lora

PARAMS = {
    "dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)},
    "weird: näme": jnp.ones((5, 6)),
    "stack": jnp.ones((3, 6, 2, 4)),
}
RULES = {
    "dense/kernel": lora.LoRA(rank=2, alpha=3.5, scaling="rank_stabilized", init="uniform", dtype="bfloat16"),
    "dense/bias": lora.Full(),
    "weird.*": lora.LoRA(rank=1),
    "stack": lora.LoRA(rank=2).at(in_axes=1, out_axes=(2, 3), batch_axes=0),
}
FROZEN, INITIAL = lora.split(jax.random.key(0), PARAMS, RULES)
LORA_PARAMS = randomized(INITIAL)


def test_the_same_bits(tmp_path):
    loaded = lora.load(lora.save(tmp_path / "adapter.safetensors", LORA_PARAMS))
    chex.assert_trees_all_equal(loaded, LORA_PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, LORA_PARAMS)
    assert loaded["dense/kernel"].factors["A"].dtype == jnp.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_a_loaded_adapter_swaps_in_without_retracing(tmp_path):
    loaded = lora.load(lora.save(tmp_path / "adapter.safetensors", LORA_PARAMS))
    traces = []

    @jax.jit
    def run(lora_params):
        traces.append(1)
        return lora.merge(FROZEN, lora_params)

    run(LORA_PARAMS), run(loaded), run(INITIAL)
    assert len(traces) == 1


@pytest.mark.standard_promotion
def test_orbax_keeps_training_state(tmp_path):
    """Adapters and their optimizer state are pytrees like any other."""
    state = {"lora_params": LORA_PARAMS, "opt_state": lora.optimizer(optax.adam(1e-3)).init(LORA_PARAMS)}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_0", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step_0", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(restored, state)


def test_the_bytes_are_reproducible(tmp_path):
    first = lora.save(tmp_path / "first", LORA_PARAMS).read_bytes()
    assert lora.save(tmp_path / "second", dict(reversed(LORA_PARAMS.items()))).read_bytes() == first
    code = "import lora_jax as lora, sys; lora.save(sys.argv[2], lora.load(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "first"), str(tmp_path / "third")], check=True)
    assert (tmp_path / "third").read_bytes() == first


def test_arrays_in_any_memory_order(tmp_path):
    (path, adapter), *_ = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2)})[1].items()
    a, b = np.arange(16.0, dtype=np.float32).reshape(2, 8).T, np.arange(8.0, dtype=np.float32).reshape(2, 4)[:, ::-1]
    strided = {path: dataclasses.replace(adapter, factors={"A": a, "B": b})}
    factors = lora.load(lora.save(tmp_path / "adapter", strided))[path].factors
    np.testing.assert_array_equal(factors["A"], a)
    np.testing.assert_array_equal(factors["B"], b)


def test_what_is_there_survives_a_failure(tmp_path, monkeypatch):
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        lora.save(path, INITIAL)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path, change):
    """The file with its description changed."""
    with safetensors.safe_open(path, framework="flax") as file:
        described = json.loads(file.metadata()["lora_jax"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(described, tensors)
    safetensors.flax.save_file(tensors, path, {"lora_jax": json.dumps(described)})


BROKEN = {
    "a missing tensor": (lambda d, t: t.pop("dense/kernel:A"), r"lacks 'dense/kernel:A' and 0 others"),
    "a tensor too many": (lambda d, t: t.update({"x:A": jnp.ones(2)}), r"belong to no adapter: 'x:A'"),
    "another shape": (
        lambda d, t: t.update({"dense/kernel:A": jnp.ones((8, 3), jnp.bfloat16)}),
        r"'dense/kernel' does not fit its description: .*shape \(8, 3\) does not fit",
    ),
    "another shape of a leaf": (
        lambda d, t: t.update({"dense/bias:weight": jnp.ones(5)}),
        r"'dense/bias' does not fit its description: .*shape \(5,\)",
    ),
    "an unknown variant": (
        lambda d, t: d["adapters"]["dense/kernel"].update(variant="Mystery"),
        r"'dense/kernel' is a Mystery, and known are .*LoRA.*: import the module",
    ),
    "an unknown field": (
        lambda d, t: d["adapters"]["dense/kernel"]["fields"].update(magic=1),
        r"'dense/kernel' does not fit its description: .*magic",
    ),
    "a bad field": (lambda d, t: d["adapters"]["dense/kernel"]["fields"].update(rank=0), r"rank is a whole number"),
    "no format": (lambda d, t: d.pop("format"), r"its metadata is damaged \(format None\)"),
    "no adapters": (lambda d, t: d.update(adapters=[]), r"its metadata is damaged"),
    "an empty entry": (lambda d, t: d["adapters"].update(x={}), r"'x' is a None, and known are"),
    "a newer format": (lambda d, t: d.update(format=3), r"format 3, and this version reads formats up to 2: update"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit(case, tmp_path):
    change, message = BROKEN[case]
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        lora.load(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        lora.load(tmp_path / "nothing")
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="adapter: no whole safetensors file"):
        lora.load(path)
    safetensors.flax.save_file({"w": jnp.ones(3)}, path)
    with pytest.raises(ValueError, match="not one that lora_jax.save wrote"):
        lora.load(path)
    with pytest.raises(ValueError, match="lora_params is empty"):
        lora.save(path, {})


def test_a_variant_of_one_s_own(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class OnlyDiagonal(lora.Variant):
        """ΔW = diag(d): a variant in a dozen lines, from outside the package."""

        gain: float = 1.0

        def initial(self, key, weight, site):
            return weight, {"d": jnp.zeros(site.shape[site.in_axes[0]])}

        def delta(self, factors, site):
            _, inner, outer = site.axes()
            eye = jnp.eye(inner[0].size, outer[0].size)
            return lora.Network((factors["d"], eye), (inner, inner + outer), self.gain)

        def labels(self):
            return {"d": "d"}

    frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": OnlyDiagonal(gain=2.0)})
    lora_params = jax.tree.map(lambda x: x + 3.0, lora_params)
    loaded = lora.load(lora.save(tmp_path / "adapter", lora_params))
    found = lora.lift(lambda p, x: x @ p["w"])(lora.attach(frozen, loaded), jnp.ones((2, 4)))
    np.testing.assert_allclose(found, 4.0 + 6.0)
    del lora.Variant.registry["OnlyDiagonal"]

"""The library's own file: the same bits back, or an error that says what does not fit."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import safetensors.flax
from checks import randomized
from damage import damaged

import lora_jax as lora
from lora_jax.formats.description import describe, restore

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
FROZEN, INITIAL = jax.jit(lambda params: lora.split(jax.random.key(0), params, RULES))(PARAMS)
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


class Full:
    """A disk without space, or a user who does not wait: whatever is raised by fsync, which comes last."""

    def __init__(self, error):
        self.error = error

    def __call__(self, _):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("odd"), KeyboardInterrupt()]
)
def test_what_is_there_survives_a_failure(error, tmp_path, monkeypatch):
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", Full(error))
    with pytest.raises(type(error)) as raised:
        lora.save(path, INITIAL)
    if isinstance(error, OSError):
        assert raised.value.errno == error.errno and f"{path}: not written (" in str(raised.value)
    if getattr(error, "errno", None):
        assert "(No space left on device): free some space" in str(raised.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_the_system_stops_writing(tmp_path):
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"adapter: not written \(File too large\): choose another disk") as raised:
            lora.save(path, INITIAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none/adapter: not written \(No such .*\): make its folder first"):
        lora.save(tmp_path / "none" / "adapter", LORA_PARAMS)
    with pytest.raises(IsADirectoryError, match="give the name of a file in it"):
        lora.save(tmp_path, LORA_PARAMS)
    with pytest.raises(OSError, match=r"not written \(File name too long\): take a shorter one"):
        lora.save(tmp_path / ("a" * 256), LORA_PARAMS)
    file = lora.save(tmp_path / ("a" * 255), LORA_PARAMS)
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        lora.save(file / "adapter", LORA_PARAMS)
    monkeypatch.setattr("os.replace", lambda *_: Full(OSError(errno.EROFS, os.strerror(errno.EROFS)))(_))
    with pytest.raises(OSError, match=r"\(Read-only file system\): choose another folder") as raised:
        lora.save(tmp_path / "adapter", LORA_PARAMS)
    assert raised.value.errno == errno.EROFS and list(tmp_path.iterdir()) == [file]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    def saved(change, path="dense/kernel"):
        adapter = LORA_PARAMS[path]
        return lora.save(tmp_path / "adapter", {path: change(adapter)})

    def factors(adapter, **change):
        return dataclasses.replace(adapter, factors={**adapter.factors, **change})

    with pytest.raises(ValueError, match="adapter: 'dense/kernel' has factor A in int4, which safetensors has not"):
        saved(lambda a: factors(a, A=a.factors["A"].astype("int4")))
    with pytest.raises(ValueError, match=r"adapter: the adapter at 'dense/kernel' does not fit.*\(3, 8, 2\)"):
        saved(lambda a: jax.tree.map(lambda x: jnp.stack([x] * 3), a))
    with pytest.raises(ValueError, match="'A' that is no array"):
        saved(lambda a: factors(a, A=None))
    with pytest.raises(ValueError, match="'dense/kernel:C' is a factor that its variant does not have"):
        saved(lambda a: factors(a, C=jnp.ones(2)))
    assert not [*tmp_path.iterdir()]
    eight = saved(lambda a: jax.tree.map(lambda x: x.astype("float8_e5m2"), a))
    assert lora.load(eight)["dense/kernel"].factors["A"].dtype == "float8_e5m2"
    wide = saved(lambda a: jax.tree.map(lambda x: np.asarray(x, np.float64), a))
    with pytest.raises(ValueError, match="'dense/kernel:A' is float64, .* half the bits: .*jax_enable_x64"):
        lora.load(wide)


def test_a_description_is_json():
    described = describe(LORA_PARAMS)
    assert json.loads(json.dumps(described)) == described
    names = restore(described)
    assert names["stack"].factors == {"A": "stack:A", "B": "stack:B"}
    assert jax.tree.structure(names) == jax.tree.structure(LORA_PARAMS)


def test_the_base_it_was_made_for(tmp_path):
    path = lora.save(tmp_path / "adapter", LORA_PARAMS, FROZEN)
    chex.assert_trees_all_equal(lora.load(path), LORA_PARAMS)
    chex.assert_trees_all_equal(lora.load(path, FROZEN), LORA_PARAMS)
    known = lora.fingerprint(FROZEN)
    assert lora.save(tmp_path / "other", LORA_PARAMS, known).read_bytes() == path.read_bytes()
    chex.assert_trees_all_equal(lora.load(path, known), LORA_PARAMS)
    other = {**FROZEN, "dense": jax.tree.map(lambda x: x + 1, FROZEN["dense"])}
    with pytest.raises(ValueError, match="adapter: made for another base, .* 2 of 4 leaves. The first is 'dense/bias'"):
        lora.load(path, other)
    anonymous = lora.save(tmp_path / "anonymous", LORA_PARAMS)
    chex.assert_trees_all_equal(lora.load(anonymous, other), LORA_PARAMS)
    smaller = {**FROZEN, "stack": FROZEN["stack"][:2]}
    for act in (lambda base: lora.load(anonymous, base), lambda base: lora.save(tmp_path / "new", LORA_PARAMS, base)):
        with pytest.raises(
            ValueError, match=r"adapts 'stack' in shape \(3, 6, 2, 4\), and base has float32\[2,6,2,4\]"
        ):
            act(smaller)
        with pytest.raises(ValueError, match="adapts 'dense/bias', and base has no such leaf: .* matches: bias"):
            act(FROZEN["dense"])
        with pytest.raises(ValueError, match="'dense/bias' is a ShapeDtypeStruct"):
            act(jax.eval_shape(lambda: FROZEN))
    assert not (tmp_path / "new").exists()


def test_a_file_of_the_first_format():
    """As its writer left it; by now `save` writes another."""
    loaded = lora.load(
        Path(__file__).parent / "fixtures" / "format_1.safetensors", {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    )
    assert loaded["w"].variant == lora.LoRA(rank=1, alpha=4) and loaded["b"].variant == lora.Full()
    assert loaded["w"].site.in_axes == (0,) and loaded["w"].site.shape == (2, 3)
    expected = {"w": {"A": [[1.0], [2.0]], "B": [[0.5, 1.5, 2.5]]}, "b": {"weight": [0.5, 1.5, 2.5]}}
    assert jax.tree.map(lambda x: x.tolist(), {p: a.factors for p, a in loaded.items()}) == expected


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
    "a format that is none": (lambda d, t: d.update(format=True), r"its metadata is damaged \(format True\)"),
    "more than it should": (lambda d, t: d.update(magic=1), r"its metadata is damaged \(an unknown entry 'magic'\)"),
    "less than it should": (lambda d, t: d.pop("lora_jax"), r"its metadata is damaged \(no entry 'lora_jax'\)"),
    "a base that is none": (lambda d, t: d.update(base={"w": 1}), r"a version or a fingerprint that is none"),
    "empty": (lambda d, t: d.update(adapters={}), r"its metadata is damaged: adapters are {}"),
    "no metadata": (lambda d, t: d.clear(), r"its metadata is damaged \(format None\)"),
    "a field that is a list": (
        lambda d, t: d["adapters"]["dense/kernel"]["fields"].update(alpha=[1]),
        r"'dense/kernel' does not fit its description: field 'alpha' is \[1\]",
    ),
    "a number without end": (
        lambda d, t: d["adapters"]["dense/kernel"]["fields"].update(alpha=10**400),
        r"'dense/kernel' does not fit its description: int too large",
    ),
    "fields that are a list": (
        lambda d, t: d["adapters"]["dense/kernel"].update(fields=[]),
        r"'dense/kernel' does not fit its description: its fields should have entries by name",
    ),
    "a shape that is not whole": (
        lambda d, t: d["adapters"]["dense/kernel"]["site"].update(shape=[8, float("nan")]),
        r"'dense/kernel' .*shape should be a list of up to 64 numbers .*nan",
    ),
    "a shape without end": (
        lambda d, t: d["adapters"]["dense/kernel"]["site"].update(shape=[8, 2**62]),
        r"'dense/kernel' .*shape should be",
    ),
    "axes out of range": (
        lambda d, t: d["adapters"]["stack"]["site"].update(in_axes=[-1]),
        r"'stack' .*in_axes should be a list of up to 64 numbers from 0 to 3, is \[-1\]",
    ),
    "axes twice": (lambda d, t: d["adapters"]["stack"]["site"].update(in_axes=[0]), r"'stack' .*a dimension twice"),
    "an unknown kind": (lambda d, t: d["adapters"]["stack"]["site"].update(kind="x"), r"'stack' .*a site of kind 'x'"),
    "a site with more": (lambda d, t: d["adapters"]["stack"]["site"].update(x=1), r"'stack' .*its site has an unknown"),
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
    with pytest.raises(IsADirectoryError, match="a folder, and no adapter file"):
        lora.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: a pipe or a device"):
        lora.load(tmp_path / "pipe")
    path = lora.save(tmp_path / "adapter", LORA_PARAMS)
    safetensors.flax.save_file({"w": jnp.ones(3)}, path)
    with pytest.raises(ValueError, match="not one that lora_jax.save wrote"):
        lora.load(path)
    with pytest.raises(ValueError, match="lora_params is empty"):
        lora.save(path, {})


@functools.cache
def whole():
    with tempfile.TemporaryDirectory() as folder:
        return lora.save(Path(folder) / "adapter", LORA_PARAMS, FROZEN).read_bytes()


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BIAS = json.dumps({"format": 1, "adapters": describe({"a": LORA_PARAMS["dense/bias"]})})


def made(entries, data=b"", text=BIAS):
    header = json.dumps({"__metadata__": {"lora_jax": text}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


HOSTILE = {
    "nothing": (b"", "its header does not end in it"),
    "half": (lambda: whole()[:-7], "no whole safetensors file"),
    "a header without end": ((2**63).to_bytes(8, "little") + b"{}", "its header does not end in it"),
    "no JSON": ((3).to_bytes(8, "little") + b"{x}", "its header is damaged"),
    "no text": ((3).to_bytes(8, "little") + b"\xff" * 3, "its header is damaged"),
    "no object": ((2).to_bytes(8, "little") + b"[]", "its metadata is missing"),
    "a header too deep": ((10**5).to_bytes(8, "little") + b"[" * 10**5, "its header is damaged"),
    "metadata too deep": (made({}, text="[" * 10**5), "its metadata is damaged"),
    "metadata of numbers": (made({}, text=3), "its metadata is missing"),
    "a name twice": (made({}, text='{"format": 1, "format": 1}'), "a name occurs twice"),
    "a negative offset": (made({"a": entry([1], -4, 0)}, b"1234"), "no whole safetensors file"),
    "overlapping": (made({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456"), "no whole safetensors file"),
    "out of range": (made({"a": entry([9], 0, 36)}, b"1234"), "no whole safetensors file"),
    "a shape without end": (made({"a": entry([0, 2**62], 0, 0)}), "no array has the shape of 'a'"),
    "an unknown dtype": (made({"a": entry([1], 0, 4, "F33")}, b"1234"), "no whole safetensors file"),
    "a dtype that JAX has not": (made({"a": entry([4], 0, 3, "F6_E2M3")}, b"123"), "'a' is of dtype F6_E2M3"),
    "a pickle": (b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01w\x94K\x01s.", "no whole safetensors file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "adapter"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(ValueError, match=f"adapter: .*{message}"):
        lora.load(path)


def test_damaged_files(tmp_path):
    """Whatever becomes of a file, it is the same adapter, an error, or an adapter that can be saved and loaded."""
    path, rng, equal, errors = tmp_path / "adapter", random.Random(0), 0, 0
    for case in range(300):
        path.write_bytes(damaged(rng, whole()))
        try:
            loaded = lora.load(path, FROZEN if case % 2 else None)
        except (ValueError, OSError) as error:
            assert f"{path}: " in str(error) and "\n" not in str(error) and len(str(error)) < 700
            errors += 1
        else:
            if describe(loaded) == describe(LORA_PARAMS):
                equal += 1
            chex.assert_trees_all_equal(lora.load(lora.save(tmp_path / "again", loaded)), loaded)
    assert errors > 200 and equal > 0


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

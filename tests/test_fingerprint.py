"""A fingerprint tells one base from another, is the same wherever that lies, and moves a few entries alone."""

from __future__ import annotations

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.fingerprint import check_base

MODULE = sys.modules["lora_jax.fingerprint"]  # its function has its name
BITS = np.arange(4096, dtype=np.uint32) * 2654435761 >> 13

# Of each dtype and rank; recorded, so that no release, platform or Python may change one unnoticed.
LEAVES = {
    "bfloat16": BITS[:384].astype(np.uint16).view(jnp.bfloat16).reshape(8, 16, 3),
    "bool": (BITS[:24] % 2 == 1).reshape(8, 3),
    "complex64": BITS[:32].view(np.complex64).reshape(8, 2),
    "empty": np.zeros((0, 8), np.float32),
    "float32": BITS.view(np.float32).reshape(64, 64),
    "float8": BITS[:64].astype(np.uint8).view(jnp.float8_e4m3fn).reshape(8, 8),
    "int4": (BITS[:256] % 8).astype(jnp.int4).reshape(16, 16),
    "int8": BITS[:200].astype(np.int8),
    "scalar": np.float32(3.5),
}
RECORDED = {
    "bfloat16": "bfloat16[8,16,3] a62fc32a",
    "bool": "bool[8,3] 18a13c96",
    "complex64": "complex64[8,2] 05d8f0e3",
    "empty": "float32[0,8] 00000000",
    "float32": "float32[64,64] a7a0b47e",
    "float8": "float8_e4m3fn[8,8] 44cb957a",
    "int4": "int4[16,16] 8cd35fb2",
    "int8": "int8[200] 498c6b27",
    "scalar": "float32[] a9f72a84",
}
SPECS = {
    "bfloat16": P("x"), "bool": P("x"), "complex64": P(), "empty": P(None, "y"), "float32": P("x", "y"),
    "float8": P("y"), "int4": P(None, "x"), "int8": P(("y", "x")), "scalar": P(),
}  # fmt: skip


def on_mesh(types=AxisType.Auto):
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("x", "y"), axis_types=(types,) * 2)
    return mesh, {path: jax.device_put(x, NamedSharding(mesh, SPECS[path])) for path, x in LEAVES.items()}


def test_the_same_as_recorded():
    assert lora.fingerprint({**LEAVES, "name": "text", "none": None, "count": 3}) == RECORDED
    assert lora.fingerprint({path: jnp.asarray(x) for path, x in LEAVES.items()}) == RECORDED
    strided = {"float32": np.asfortranarray(LEAVES["float32"]).astype(">f4")}
    assert lora.fingerprint(strided)["float32"] == RECORDED["float32"]


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_the_same_on_a_mesh(types):
    mesh, leaves = on_mesh(types)
    assert lora.fingerprint(leaves) == RECORDED
    with jax.set_mesh(mesh):
        assert lora.fingerprint(leaves) == RECORDED


def test_the_same_where_entries_are_read_on_the_device(monkeypatch):
    """As on an accelerator, whose arrays NumPy has no view of."""
    read = []

    def entries(array, where):
        read.append(MODULE._gathered(array, where))
        return read[-1]

    monkeypatch.setattr(MODULE, "_entries", entries)
    mesh, leaves = on_mesh()
    some = {path: jnp.asarray(LEAVES[path]) for path in ("scalar", "int8", "int4")} | {"bfloat16": leaves["bfloat16"]}
    with jax.set_mesh(mesh):
        assert lora.fingerprint(some) == {path: RECORDED[path] for path in sorted(some)}
    assert {x.size for x in read} == {1, 64}, "more than a few entries were read"


def test_typed_keys():
    keys = jax.random.split(jax.random.key(0), (8, 2))
    (found,) = lora.fingerprint({"keys": keys}).values()
    mesh, _ = on_mesh()
    assert lora.fingerprint({"keys": jax.device_put(keys, NamedSharding(mesh, P("y")))})["keys"] == found
    assert found.startswith("key<fry>[8,2] ") and lora.fingerprint([keys[::-1]])["0"] != found


def test_which_entries_are_read():
    for size in (*range(300), 4096**2, 2**45 + 1):
        places = MODULE._positions(size)
        assert len(places) == min(size, 64) and (np.diff(places) > 0).all()
        assert size == 0 or (places[0] == 0 and places[-1] == size - 1)
    steps = np.diff(MODULE._positions(4096**2))
    assert steps.max() < 2 * 4096**2 / 64 and len({*(steps % 4096)}) > 50, "a column, or a diagonal"


def test_what_it_tells_apart():
    base = LEAVES["float32"]
    first, last, swapped, negated = (base.copy() for _ in range(4))
    first[0, 0] += 1
    last[-1, -1] += 1
    swapped[[0, -1]] = swapped[[-1, 0]]
    others = [
        base,
        first,
        last,
        swapped,
        -base,
        2 * base,
        base.T,
        base[::-1],
        base.reshape(32, 128),
        base.view("int32"),
    ]
    others += [np.zeros_like(base), -np.zeros_like(base), np.ones_like(base), base[:63], base.astype(np.float64)]
    found = [lora.fingerprint({"w": x})["w"] for x in others]
    assert len({*found}) == len(found)
    assert all(a.split()[1] != b.split()[1] for a, b in itertools.combinations(found[:8], 2)), "by their values alone"


def test_leaves_without_values():
    with pytest.raises(ValueError, match=r"'a/0' is a ShapeDtypeStruct.* give the arrays themselves"):
        lora.fingerprint({"a": [jax.ShapeDtypeStruct((2,), "float32")]})
    with pytest.raises(ValueError, match="'w' is traced.* outside of jax.jit"):
        jax.eval_shape(lambda w: lora.fingerprint({"w": w}), jnp.ones(2))


BASE = {"dense": {"kernel": np.ones((4, 2), "float32"), "bias": np.zeros(2, "float32")}, "head": np.ones(3, "float32")}


OTHERS = {
    "renamed": (
        lambda b: b["dense"].update(kernl=b["dense"].pop("kernel")),
        r"differs in 2 of 4 leaves. The first is 'dense/kernel': this base has no such leaf; close matches: dense/k",
    ),
    "larger": (lambda b: b.update(extra=b["head"]), r"1 of 4 leaves. The first is 'extra': that base had no such leaf"),
    "cast": (
        lambda b: b.update(head=np.ones(3, "float16")),
        r"1 of 3 .*'head': it was float32\[3\] and is float16\[3\]. To go on, give .* in the dtypes it had",
    ),
    "trained": (
        lambda b: b["dense"].update(bias=np.ones(2, "float32")),
        r"'dense/bias': the same float32\[2\] with other values. To go on, give .* what `split` returned as frozen",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_another_base_is(case):
    change, message = OTHERS[case]
    other = {**BASE, "dense": {**BASE["dense"]}}
    change(other)
    expected = lora.fingerprint(BASE)
    check_base("file", expected, dict(reversed(expected.items())))
    with pytest.raises(ValueError, match=f"^file: made for another base, .*{message}"):
        check_base("file", expected, lora.fingerprint(other))

"""Checkpoints of any layout, on any sharding: what is loaded and saved is the same bits, and a tensor at a time."""

import functools
import json
import os
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save, save_file

import lora_jax as lora
from lora_jax.formats import huggingface

LAYERS = 8
LAYER = r"layers(?:_(?P<layer>\d+))?/"
# One entry for each way in which ours may lie in theirs.
NAMES = (
    ("embed", "model.embed", "embedding"),
    (LAYER + "norm", "model.{layer}.norm", "vector"),
    (LAYER + "up", "model.{layer}.up", "linear"),
    (LAYER + "query", "model.{layer}.qkv[0]", "linear: in heads width -> (heads width) in"),
    (LAYER + "key", "model.{layer}.qkv[1]", "linear: in heads width -> (heads width) in"),
    (LAYER + "down", "model.{layer}.down[0]", "conv1d"),
    (LAYER + "side", "model.{layer}.down[1]", "conv1d"),
    (LAYER + "both", "model.{layer}.{part:gate,value}", "linear: in part out -> out in"),
    (LAYER + "experts", "model.{layer}.experts", "experts"),
    ("conv", "model.conv", "conv"),
)
SHAPES = {
    "norm/scale": (8,),
    "up/kernel": (8, 16),
    "up/bias": (16,),
    "query/kernel": (8, 4, 2),
    "query/bias": (4, 2),
    "key/kernel": (8, 2, 2),
    "key/bias": (2, 2),
    "down/kernel": (16, 8),
    "side/kernel": (16, 4),
    "both/kernel": (8, 2, 16),
    "experts/kernel": (2, 8, 16),
}
SPLIT = {"layers/(up|down|side|both)/kernel": P(None, "fsdp"), "layers/experts.*": P(None, "fsdp", "stage"), ".*": P()}
APART = {"layers_./(up|query)/kernel": P("fsdp"), "layers_./.*/bias": P("fsdp"), "embed.*": P("fsdp"), ".*": P()}


def shapes(stacked):
    found = {"embed/embedding": (16, 8), "conv/kernel": (3, 3, 2, 4)}
    for path, shape in SHAPES.items():
        found |= {f"layers/{path}": (LAYERS, *shape)} if stacked else {f"layers_{i}/{path}": shape for i in (0, 1)}
    return {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in found.items()}


@functools.cache
def tensors(layers):
    """Random tensors of theirs; the constant is one that no leaf has."""
    draws = np.random.default_rng(0)
    each = {"norm.weight": (8,), "up.weight": (16, 8), "up.bias": (16,), "qkv.weight": (12, 8), "qkv.bias": (12,)}
    each |= {"down.weight": (16, 12), "gate.weight": (16, 8), "value.weight": (16, 8), "experts": (2, 16, 8)}
    found = {"embed.weight": (16, 8), "conv.weight": (4, 2, 3, 3)}
    found |= {f"{i}.{name}": shape for i in range(layers) for name, shape in each.items()}
    found = {f"model.{name}": draws.standard_normal(s).astype(ml_dtypes.bfloat16) for name, s in found.items()}
    return {**found, "positions": np.arange(5)}


def ours(name, i):
    """A leaf's entry as its definition has it, from layer i."""
    theirs = {key.removeprefix(f"model.{i}."): x for key, x in tensors(LAYERS).items()}
    return {
        "norm/scale": lambda: theirs["norm.weight"],
        "up/kernel": lambda: theirs["up.weight"].T,
        "up/bias": lambda: theirs["up.bias"],
        "query/kernel": lambda: theirs["qkv.weight"][:8].T.reshape(8, 4, 2),
        "query/bias": lambda: theirs["qkv.bias"][:8].reshape(4, 2),
        "key/kernel": lambda: theirs["qkv.weight"][8:].T.reshape(8, 2, 2),
        "key/bias": lambda: theirs["qkv.bias"][8:].reshape(2, 2),
        "down/kernel": lambda: theirs["down.weight"][:, :8],
        "side/kernel": lambda: theirs["down.weight"][:, 8:],
        "both/kernel": lambda: np.stack([theirs["gate.weight"].T, theirs["value.weight"].T], 1),
        "experts/kernel": lambda: theirs["experts"].transpose(0, 2, 1),
    }[name]()


def write(folder, found, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("stage", "fsdp"), axis_types=(kind,) * 2)


def same(left, right):
    return (left.shape, left.dtype) == (right.shape, right.dtype) and left.tobytes() == right.tobytes()


@pytest.mark.parametrize(
    "stacked, rules, kind",
    [
        (True, None, None),
        (False, APART, AxisType.Auto),
        (True, SPLIT, AxisType.Auto),
        (True, {"layers/.*": P("stage"), ".*": P()}, AxisType.Explicit),
    ],
    ids=["one device", "layers apart", "sharded", "layers sharded, explicit"],
)
def test_any_layout_on_any_sharding_is_the_same_bits(tmp_path, stacked, rules, kind):
    layers = LAYERS if stacked else 2
    folder = write(tmp_path / "theirs", tensors(layers))
    checkpoint = huggingface.open_checkpoint(folder, ignored=["positions"])
    where = rules and functools.partial(lora.match_partition_rules, rules, mesh=mesh(kind))
    params = huggingface.fill(shapes(stacked), checkpoint, NAMES, shardings=where)
    for name in SHAPES:
        found = np.asarray(params[f"layers/{name}"]) if stacked else params[f"layers_1/{name}"]
        assert same(found[3] if stacked else found, ours(name, 3 if stacked else 1)), name
    if rules:
        assert all(params[path].sharding == sharding for path, sharding in where(shapes(stacked)).items())
        assert len(params["layers/up/kernel" if stacked else "layers_0/up/kernel"].addressable_shards) == 8
    saved = huggingface.save(tmp_path / "saved", params, NAMES, source=checkpoint)
    assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (saved / "config.json").read_text() == '{\n  "dtype": "bfloat16"\n}\n'


def test_host_memory_is_for_a_tensor(tmp_path):
    wide = {f"{i}.up.weight": np.full((512, 512), i, np.float32) for i in range(16)}
    checkpoint = huggingface.open_checkpoint(write(tmp_path / "wide", wide))
    names = [("up", "{layer}.up", "linear")]

    def peak(function):
        function()  # what is compiled takes memory, too
        tracemalloc.start()
        try:
            function()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    shape = {"up": {"kernel": jax.ShapeDtypeStruct((16, 512, 512), jnp.float32)}}
    params = huggingface.fill(shape, checkpoint, names)
    one = wide["0.up.weight"].nbytes
    assert one < peak(lambda: huggingface.fill(shape, checkpoint, names)) < 4 * one
    files = iter("abc")
    assert peak(lambda: huggingface.save(tmp_path / next(files), params, names, config={})) < 4 * one
    assert all(same(x, wide[name]) for name, x in load_file(tmp_path / "b" / "model.safetensors").items())


def test_files_are_those_that_safetensors_writes(tmp_path):
    found = {f"x{i}": np.ones((2, i), dtype) for i, dtype in enumerate(("int8", "float64", "float16", "bool", "int64"))}
    found |= {"é": np.ones((), np.float32), "y": np.ones(0, ml_dtypes.bfloat16), "z": np.ones((3, 2), np.float32)}
    huggingface.write(tmp_path / "a", {**found, "z": found["z"].T.copy().T}, config={})
    assert (tmp_path / "a/model.safetensors").read_bytes() == save(found, {"format": "pt"})


def test_shards_cast_and_what_is_beside_them(tmp_path):
    folder = write(tmp_path / "theirs", tensors(2), torch_dtype="bfloat16", dtype="bfloat16")
    beside = {"tokenizer.json", "generation_config.json", "merges.txt"}
    for name in (*beside, "pytorch_model.bin", "modeling.py"):
        (folder / name).write_text(name)
    checkpoint = huggingface.open_checkpoint(folder, ignored=["positions"])
    # A checkpoint's own tensors are tensors to write, and so is what is computed of one when its turn comes.
    up = checkpoint.tensors["model.1.up.weight"]
    doubled = huggingface.Lazy(up.shape, up.dtype, lambda: 2 * np.asarray(up))
    given = {**checkpoint.tensors, "model.1.up.weight": doubled}
    saved = huggingface.write(tmp_path / "saved", given, source=checkpoint, dtype="float32", max_shard_size=3000)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    shards = {name: load_file(saved / name) for name in sorted(set(index["weight_map"].values()))}
    assert list(shards) == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert {name: file for file, found in shards.items() for name in found} == index["weight_map"]
    sizes = [sum(x.nbytes for x in found.values()) for found in shards.values()]
    assert max(sizes) <= 3000 and index["metadata"] == {"total_size": sum(sizes)}
    found = {name: x for shard in shards.values() for name, x in shard.items()}
    for name, x in tensors(2).items():
        x = 2 * x if name == "model.1.up.weight" else x
        assert same(found[name], x if name == "positions" else x.astype(np.float32))
    others = {file.name for file in saved.iterdir()} - {*shards, "config.json", "model.safetensors.index.json"}
    assert others == beside
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"
    # Of a checkpoint's tensors each goes to the file where it was, whatever the rule by which they were dealt out.
    index["weight_map"] = dict.fromkeys(found, last := f"model-{len(shards):05}-of-{len(shards):05}.safetensors")
    for name in shards:
        (saved / name).unlink()
    save_file(found, saved / last, {"format": "pt"})
    index["metadata"] |= {"total_parameters": 7}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    checkpoint = huggingface.open_checkpoint(saved)
    again = huggingface.write(tmp_path / "again", checkpoint.tensors, source=checkpoint)
    for file in (last, "model.safetensors.index.json"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()


def test_tied_tensor_that_is_written_all_the_same(tmp_path):
    names, untied = [("embed", "embed=head", "embedding")], [("embed", "embed", "embedding")]
    embed = np.arange(6, dtype=np.float32).reshape(3, 2)
    shape = {"embed": {"embedding": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
    folder = write(tmp_path / "same", {"embed.weight": embed, "head.weight": embed})
    with pytest.raises(huggingface.CheckpointError, match="left over: 'head.weight'"):
        huggingface.fill(shape, huggingface.open_checkpoint(folder), untied)
    checkpoint = huggingface.open_checkpoint(folder)
    params = huggingface.fill(shape, checkpoint, names)
    saved = huggingface.save(tmp_path / "saved", params, names, source=checkpoint)
    assert (saved / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    folder = write(tmp_path / "other", {"embed.weight": embed, "head.weight": -embed})
    with pytest.raises(huggingface.CheckpointError, match="'head.weight' is not 'embed.weight'"):
        huggingface.fill(shape, huggingface.open_checkpoint(folder), names)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "index, cause",
    [
        ('{"weight_map": {"x": "/etc/model.safetensors"}}', "a shard is a file beside it"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "a shard is a file beside it"),
        ('{"weight_map": {"x": "a\\\\b.safetensors"}}', "a shard is a file beside it"),
        ('{"weight_map": {"x": "a\\u0000.safetensors"}}', "a shard is a file beside it"),
        ('{"weight_map": {"x": "config.json"}}', "a shard is a file beside it"),
        ('{"weight_map": {"x": "link.safetensors"}}', "a link to .* outside of its directory"),
        ('{"weight_map": {"x": "one.safetensors", "x": "two.safetensors"}}', "a name occurs twice"),
        ('{"weight_map": {"x": "one.safetensors"}}', "'x' is in 'two.safetensors', where"),
        ('{"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}', "'x' is in 'two.safetensors', where"),
        ('{"weight_map": {"x": ["one.safetensors"]}}', "no weight_map from names to files"),
        ("[]", "no JSON object"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "no weight_map"),
    ],
)
def test_index_of_a_stranger(tmp_path, index, cause):
    folder = write(tmp_path / "model", {})
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    save_file({"x": np.ones(2)}, folder / "one.safetensors")
    save_file({"x": np.ones(2), "y": np.ones(2)}, folder / "two.safetensors")
    if "two" in cause and '"y"' not in index:
        index = index.replace("}}", ', "y": "two.safetensors"}}')
    (folder / INDEX).write_text(index)
    with pytest.raises(huggingface.CheckpointError, match=cause):
        huggingface.open_checkpoint(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path, monkeypatch):
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    write(tmp_path / "model", {"x": np.ones(2, np.float32)})
    for i, name in enumerate(("config.json", "model.safetensors", "tokenizer.json")):
        (tmp_path / "model" / "tokenizer.json").write_text("{}")
        os.replace(tmp_path / "model" / name, blobs / str(i))
        (folder / name).symlink_to(f"../../blobs/{i}")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    checkpoint = huggingface.open_checkpoint(huggingface.download("a/b", "main"))
    assert asked["name"] == "a/b" and asked["revision"] == "main"
    assert not any(Path(name).match(p) for p in asked["allow_patterns"] for name in ("model.bin", "x.pkl", "run.py"))
    saved = huggingface.write(tmp_path / "saved", checkpoint.tensors, source=checkpoint)
    assert (saved / "tokenizer.json").read_text() == "{}"
    (folder / "merges.txt").symlink_to(__file__)
    with pytest.raises(huggingface.CheckpointError, match=r"merges.txt' is a link to .*test_huggingface.py"):
        huggingface.write(tmp_path / "again", checkpoint.tensors, source=folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lora-jax\[hub\]'"):
        huggingface.download("a/b")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", None])
def test_quantized_checkpoints_are_refused(tmp_path, method):
    given = {"quantization_config": {"quant_method": method}} if method else {"compression_config": [1]}
    folder = write(tmp_path / "model", {"x": np.ones(2, np.float32)}, **given)
    with pytest.raises(huggingface.CheckpointError, match=f"quantized weights \\({method or 'compression_config'}\\)"):
        huggingface.open_checkpoint(folder)


def test_dtypes_that_cannot_be_held(tmp_path):
    names = [("(a|b|c)", r"{layer}.\1", "vector")]
    shape = {name: {"scale": jax.ShapeDtypeStruct((2, 3), jnp.float32)} for name in "abc"}
    found = {f"{i}.{name}.weight": np.ones(3, np.float32) for i in range(2) for name in "abc"}
    found |= {
        "0.a.weight": np.ones(3),
        "1.b.weight": np.ones(3, ml_dtypes.float8_e4m3fn),
        "1.c.weight": np.ones(3, np.float16),
    }
    checkpoint = huggingface.open_checkpoint(write(tmp_path / "model", found))
    with pytest.raises(huggingface.CheckpointError) as error:
        huggingface.fill(shape, checkpoint, names)
    assert str(error.value).split("\n  ")[1:] == [
        "'0.a.weight' is F64, of which JAX would lose half the bits: give dtype=",
        "'1.b.weight' is F8_E4M3, b/scale needs one of F64, F32, F16, BF16",
        "c/scale is stacked of '1.c.weight' F16 and '0.c.weight' F32: give dtype=",
    ]
    del shape["b"], checkpoint.tensors["0.b.weight"], checkpoint.tensors["1.b.weight"]
    assert huggingface.fill(shape, checkpoint, names, jnp.float32)["c"]["scale"].dtype == jnp.float32


def test_shardings_that_do_not_fit():
    shape = {"up": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}
    checkpoint = huggingface.Checkpoint(Path(), {}, {})
    fill = functools.partial(huggingface.fill, shape, checkpoint, [("up", "up", "linear")])
    for shardings, cause in (
        (lambda shapes: lora.match_partition_rules({".*": P()}, shapes), "a PartitionSpec, of no mesh for 'up/kernel'"),
        ({"down": NamedSharding(mesh(), P())}, "no sharding for 'up/kernel'"),
        (NamedSharding(mesh(), P("stage")), "does not divide it"),
    ):
        with pytest.raises(ValueError, match=cause):
            fill(shardings=shardings)


def test_a_directory_is_written_whole_or_not_at_all(tmp_path):
    x = {"x": np.ones(2, np.float32)}
    failing = huggingface.Lazy((2,), np.dtype("float32"), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        huggingface.write(tmp_path / "new", {**x, "y": failing}, config={})
    wrong = huggingface.Lazy((2,), np.dtype("float32"), lambda: np.ones(3, np.float32))
    with pytest.raises(ValueError, match="'y' was to be"):
        huggingface.write(tmp_path / "new", {"y": wrong}, config={})
    with pytest.raises(ValueError, match="needs a config.json"):
        huggingface.write(tmp_path / "new", x)
    with pytest.raises(OSError, match="new/model: not written .*make its folder first"):
        huggingface.write(tmp_path / "new" / "model", x, config={})
    assert not any(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    saved = huggingface.write(tmp_path / "empty", x, config={})
    with pytest.raises(FileExistsError, match="holds something.*choose another name"):
        huggingface.write(saved, x, config={})
    checkpoint = huggingface.open_checkpoint(saved)
    with pytest.raises(huggingface.CheckpointError, match=r"'x' \(2,\), given \(3,\)"):
        huggingface.write(tmp_path / "new", {"x": np.ones(3)}, source=checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]


def test_file_that_changes_after_it_was_opened(tmp_path):
    folder = write(tmp_path / "model", {"x": np.ones(64, np.float32)})
    checkpoint = huggingface.open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(huggingface.CheckpointError, match="has changed since it was opened"):
        np.asarray(checkpoint.tensors["x"])

"""PEFT's folders from strangers and from broken disks: an error or the right result, in bounded time and memory.

And what PEFT does wrong with adapters once they are loaded: swapped, merged, trained on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import struct
import time
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checks import error
from damage import damaged_folder
from test_peft_strict import NAMES, PARAMS, TENSORS, load, write

import lora_jax as lora
from lora_jax.formats import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_nothing_but_the_two_files_is_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder.*downloaded"):
        peft.load(tmp_path / "user" / "name", PARAMS, NAMES)
    with pytest.raises(FileNotFoundError, match="adapter_config.json' is missing: copy it"):
        peft.load(tmp_path, PARAMS, NAMES)
    folder = write(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="give one of its folders, adapter"):
        peft.load(tmp_path, PARAMS, NAMES)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which may run any code and is never opened"):
        peft.load(folder, PARAMS, NAMES)
    for name in (CONFIG, WEIGHTS):
        folder = write(tmp_path / "linked")
        (tmp_path / "outside").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to("../outside")
        with pytest.raises(OSError, match="a link out of its folder, which is not followed"):
            peft.load(folder, PARAMS, NAMES)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(OSError, match="is no file"):
            peft.load(folder, PARAMS, NAMES)
        (folder / name).unlink()


def test_a_snapshot_in_hugging_faces_cache_loads(tmp_path):
    """Its files are links to ../../blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write(blobs)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert len(peft.load(snapshot, PARAMS, NAMES)) == 2


TEXTS = {
    "deep": ("[" * 10**6, "no JSON"),
    "large": (" " * (2**24 + 1), "larger than 16 MiB"),
    "twice": ('{"r": 2, "r": 4}', "a name occurs twice"),
    "not a number": ('{"r": NaN}', "NaN is no number"),
    "not text": ("\ud800", "no JSON"),
    "endless digits": ('{"r": 1' + "0" * 10**5 + "}", "no JSON"),
    "large numbers": ('{"peft_type": "LORA", "r": 1000000000, "lora_alpha": 1, "target_modules": ["q_proj"]}', "rank"),
    "beyond numbers": ('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999, "target_modules": ["q_proj"]}', "finite"),
    "a list": ("[]", "no configuration"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_configurations_that_are_none(what, tmp_path):
    text, message = TEXTS[what]
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=message) as raised:
        peft.load(tmp_path, PARAMS, NAMES)
    assert len(str(raised.value)) < 600


def test_headers_that_lie_take_no_memory(tmp_path):
    write(tmp_path)
    tensors = {"x": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    text = json.dumps(tensors).encode()
    lies = (
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", len(text)) + text,
        struct.pack("<Q", 10**6) + b"[" * 10**6,
    )
    for content in lies:
        (tmp_path / WEIGHTS).write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match="no whole safetensors file"):
            peft.load(tmp_path, PARAMS, NAMES)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()


@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_folders(sealed, tmp_path, trials=100):
    """What loads is what the files say: of ours, but for the tensors' own bits, what was saved."""
    folder = write(tmp_path / "adapter", alpha_pattern={"0.q_proj": 3})
    original = peft.load(folder, PARAMS, NAMES)
    if sealed:
        peft.save(folder, original, NAMES)
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    outcomes = []
    for seed in range(trials):
        for name, content in damaged_folder(random.Random(f"{seed} {sealed}"), files).items():
            (folder / name).write_bytes(content)
        start = time.process_time()
        try:
            loaded = peft.load(folder, PARAMS, NAMES)
        except (ValueError, OSError) as raised:
            outcomes.append(type(raised))
            assert str(folder) in str(raised) and len(str(raised)) < 2000, (seed, raised)
        else:
            outcomes.append(None)
            assert sealed <= (jax.tree.structure(loaded) == jax.tree.structure(original)), seed
            _check_loaded(loaded, folder)
        assert time.process_time() - start < 2, seed
    assert 0.6 < 1 - outcomes.count(None) / trials < 1


def _check_loaded(loaded, folder):
    """By another reader, and Python's own patterns."""
    tensors, config = safetensors.numpy.load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    for path, adapter in loaded.items():
        module = f"model.layers.{path[7]}.{path[9:].split('/')[0]}_proj"
        for x in "AB":
            found = tensors.pop(f"base_model.model.{module}.lora_{x}.weight")
            np.testing.assert_array_equal(
                np.asarray(adapter.factors[x]).view("u1"), np.ascontiguousarray(found.T).view("u1")
            )
        alphas = (
            value for key, value in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({key})$", module)
        )
        alpha = next(alphas, config["lora_alpha"])
        rank = adapter.factors["A"].shape[1]
        assert adapter.variant.scale == pytest.approx(alpha / (rank**0.5 if config.get("use_rslora") else rank))
    assert not tensors


def test_another_adapter_swaps_in_as_it_is(tmp_path):
    """PEFT's hotswap takes the first adapter's ranks for granted; here other ranks are another tree."""
    pattern = {"alpha_pattern": {"0.q_proj": 1}}
    other = {name: 2 * x for name, x in TENSORS.items()}
    folders = [load(tmp_path / "a", **pattern), load(tmp_path / "b", tensors=other, **pattern)]
    folders.append(load(tmp_path / "c", lora_alpha=9, **pattern))
    traces = []

    @jax.jit
    def merged(lora_params):
        traces.append(1)
        return lora.merge(PARAMS, lora_params)["layers_0"]["q"]["kernel"]

    for lora_params in folders:
        adapter = lora_params["layers_0/q/kernel"]
        delta = adapter.variant.scale * adapter.factors["A"] @ adapter.factors["B"]
        np.testing.assert_allclose(merged(lora_params), PARAMS["layers_0"]["q"]["kernel"] + delta, rtol=1e-5, atol=1e-5)
    assert len(traces) == 2


def test_merging_leaves_nothing_half_done(tmp_path):
    """PEFT's safe_merge leaves the layers merged that came before the one it raises at."""
    last = next(reversed(TENSORS))
    lora_params = load(tmp_path, tensors={**TENSORS, last: np.full_like(TENSORS[last], 3e38)})
    before = jax.tree.map(np.asarray, PARAMS)
    with pytest.raises(ValueError, match="not finite"):
        lora.merge(PARAMS, lora_params)
    chex.assert_trees_all_equal(PARAMS, before)


def test_merging_rounds_once(tmp_path):
    """PEFT rounds ΔW, and then the sum, to the base's bfloat16."""
    bfloat16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    adapter = (lora_params := load(tmp_path))["layers_0/q/kernel"]
    base = np.asarray(bfloat16["layers_0"]["q"]["kernel"]).astype(np.float32)
    delta = 3 * np.asarray(adapter.factors["A"]) @ np.asarray(adapter.factors["B"])
    expected = (base + delta).astype(jnp.bfloat16)
    np.testing.assert_array_equal(lora.merge(bfloat16, lora_params)["layers_0"]["q"]["kernel"], expected)


def test_a_base_of_whole_numbers_is_no_base(tmp_path):
    """PEFT merges into quantized weights, and rounds them anew: ΔW is mostly lost."""
    whole = jax.tree.map(lambda x: x.astype(jnp.int8), PARAMS)
    with pytest.raises(ValueError, match="q/kernel' is int8, which no adapter is for"):
        peft.load(write(tmp_path), whole, NAMES)


def test_a_tied_table_is_merged_into_what_it_is_for(tmp_path):
    """In PEFT the head of tied embeddings is another after merging than before."""
    names = {f"base_model.model.model.embed_tokens.lora_embedding_{x}": s for x, s in (("A", (2, 10)), ("B", (4, 2)))}
    tensors = {name: np.full(shape, 0.1, np.float32) for name, shape in names.items()}
    params = {"embed": PARAMS["embed"]}
    lora_params = peft.load(write(tmp_path, tensors=tensors, target_modules=["embed_tokens"]), params, NAMES)

    def logits(params):
        table = params["embed"]["embedding"]
        return jnp.tanh(table[jnp.arange(3)]) @ table.T

    lifted = lora.lift(logits)(lora.attach(params, lora_params))
    assert error(lifted, logits(lora.merge(params, lora_params))) < 1e-6 < error(lifted, logits(params))


def test_training_goes_on_from_what_was_loaded(tmp_path):
    """PEFT's adapters come back frozen, or as drawn anew: the factors here are a tree that trains as before."""
    saved = load(tmp_path / "a", lora_alpha=2)
    loaded = peft.load(peft.save(tmp_path / "b", saved, NAMES), PARAMS, NAMES)

    @jax.jit
    def step(lora_params):
        def loss(lora_params):
            return sum((x**2).sum() for x in jax.tree.leaves(lora.merge(PARAMS, lora_params)))

        return jax.tree.map(lambda x, g: x - 0.1 * g, lora_params, jax.grad(loss)(lora_params))

    chex.assert_trees_all_equal(loaded, saved)
    chex.assert_trees_all_equal(step(loaded), step(saved))
    assert all(bool((a != b).all()) for a, b in zip(*map(jax.tree.leaves, (step(loaded), loaded)), strict=True))
    assert dataclasses.asdict(loaded["layers_0/q/kernel"].variant) == dataclasses.asdict(
        saved["layers_0/q/kernel"].variant
    )

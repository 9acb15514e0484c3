"""Checkpoints that are damaged are passed over, those of another base or rules are refused, and none holds the base."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import FROZEN, LORA_PARAMS, TX, listed, run, state, undisturbed

import lora_jax as lora
from lora_jax.formats import manifest
from lora_jax.formats.orbax import Checkpoints, load

pytestmark = pytest.mark.standard_promotion  # Adam's

# Damaged


@functools.cache
def saved(folder):
    run(folder, 3)
    return folder


@pytest.fixture
def folder(tmp_path_factory):
    """Checkpoints of steps 1, 2 and 3."""
    return shutil.copytree(saved(tmp_path_factory.getbasetemp() / "saved"), tmp_path_factory.mktemp("run") / "run")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damage_to_any_file_is_found(folder):
    files = [file for file in (folder / "3").rglob("*") if file.is_file()]
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # orbax restores without them, as follows
    assert {file.name for file in files} >= {manifest.NAME, *harmless, "process_0.json", "manifest.ocdbt"}
    for file, damage in itertools.product(files, (cut, flip, Path.unlink)):
        content = file.read_bytes()
        damage(file)
        assert manifest.newest(folder)[0] == (3 if file.name in harmless else 2), (file, damage)
        file.write_bytes(content)
    for file in files:
        if file.name in harmless:
            file.unlink()
    chex.assert_trees_all_equal(run(folder), undisturbed())


def test_the_one_before_is_used_and_what_is_damaged_is_put_aside(folder, caplog):
    flip(next((folder / "3" / "rest").glob("**/d/*")))
    for name in ("4", "damaged-3"):
        (folder / name).mkdir()
    (shutil.copytree(folder / "2", folder / "5") / manifest.NAME).unlink()
    shutil.copytree(folder / "2" / "adapter", folder / "6.orbax-checkpoint-tmp" / "adapter.orbax-checkpoint-tmp")
    (folder / "7").write_text("a file")
    (folder / "8" / manifest.NAME).mkdir(parents=True)
    before = {path for path in listed(folder) if path.parts[0] in ("2", "damaged-3", "7")}
    with caplog.at_level(logging.WARNING, "lora_jax"):
        chex.assert_trees_all_equal(run(folder, keep_last=10), undisturbed())
    for step, cause in (
        (3, "rest/.* is not as it was"),
        (4, "is missing"),
        (5, "written last, is missing"),
        (8, "cannot be read"),
    ):
        (message,) = [each for each in caplog.messages if each.startswith(str(folder / str(step)))]
        assert re.search(rf"{cause}.*: going on from step 2", message)
    assert listed(folder) >= before | {Path("damaged-3-1/rest"), Path("damaged-4"), Path("damaged-5/adapter")}
    assert manifest.steps(folder) == [1, 2, 3, 4, 5, 6]


def test_where_all_are_damaged(folder):
    for step in (1, 2, 3):
        cut(folder / str(step) / manifest.NAME)
    before = listed(folder)
    with pytest.raises(ValueError, match=rf"{folder}: no checkpoint is intact \(step 3: .*step 1: .*start in another"):
        run(folder)
    assert listed(folder) == before


# What does not fit


def changed(folder, change):
    """A manifest with something else in it, and with its sum."""
    about = manifest.read(folder)
    change(about)
    manifest.write(folder, {name: x for name, x in about.items() if name != "files"})


OTHERS = {
    "base": (lambda: ({"w": FROZEN["w"] + 1}, state()), r"another base.*'w': the same float32\[256,128\] with other"),
    "rules": (lambda: split("w", lora.LoRA(2)), r"its adapters do not fit .*dropout.*: split by the rules"),
    "rank": (lambda: split("w", lora.LoRA(3, dropout=0.5)), r"its adapters do not fit .*rank' was 2 and is 3"),
    "optimizer": (
        lambda: (FROZEN, state(tx=lora.optimizer(optax.sgd(0.1)))),
        r"its arrays beside the adapters do not fit .*take the optimizer that it was made with",
    ),
    "version": (
        lambda: (FROZEN, state()),
        r"3: format 2, and this version reads format 1: update lora_jax",
    ),
}


def split(path, variant):
    frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((256, 128))}, {path: variant})
    return frozen, state(lora_params)


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another(case, folder):
    made, message = OTHERS[case]
    frozen, like = made()
    if case == "version":
        changed(folder / "3", lambda about: about.update(format=2))
    before = listed(folder)
    with Checkpoints(folder, frozen) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.read(like)
    assert listed(folder) == before
    assert not any(x.is_deleted() for x in jax.tree.leaves(like))


# What is in it


def test_no_base_weights(tmp_path):
    """As in a TrainState that has them beside the adapters."""
    tree = {"params": {"base": FROZEN, "lora": LORA_PARAMS}, "opt_state": TX.init(LORA_PARAMS), "step": 3}
    with Checkpoints(tmp_path, FROZEN, lora_params=lambda tree: tree["params"]["lora"]) as checkpoints:
        checkpoints.save(3, tree)
        checkpoints.wait()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < FROZEN["w"].nbytes
        other = {**tree, "opt_state": jax.tree.map(jnp.zeros_like, tree["opt_state"]), "step": 0}
        found = checkpoints.restore(other)
        chex.assert_trees_all_equal(found, tree)
        assert found["params"]["base"]["w"] is FROZEN["w"]
        with pytest.raises(ValueError, match="has the base's 'w' at 'ema/w', and checkpoints hold no base weights"):
            checkpoints.save(4, {**tree, "ema": {"w": FROZEN["w"] * 2, "more": 0}})


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(OSError, match=rf"{folder}: no folder for checkpoints can be made there .*: give one"):
            Checkpoints(folder, FROZEN)
    with Checkpoints(tmp_path / "a" / "b", FROZEN) as checkpoints:
        assert checkpoints.read(state()) is None


def test_states_of_many_kinds(tmp_path):
    """Of what trees may hold: an average that begins as the adapters themselves, counts of Python's, keys, NumPy's."""
    average = jax.tree.map(lambda x: x + 1, LORA_PARAMS)
    one = {"average": average, "tokens": 2**40, "key": jax.random.key(1, impl="rbg"), "long": np.int64(2**40)}
    one |= {"name": "a", "none": None, "yes": True, "rate": 0.5, "base": FROZEN, "a.b: ü": (jnp.ones(2, "int4"), {})}
    zero = {**one, "average": LORA_PARAMS, "tokens": 0, "key": jax.random.key(0, impl="rbg"), "long": np.int64(0)}
    zero |= {"yes": False, "rate": 0.0, "a.b: ü": (jnp.zeros(2, "int4"), {})}
    with Checkpoints(tmp_path, FROZEN, lora_params=lambda state: state["lora"]) as checkpoints:
        checkpoints.save(jnp.int32(1), {"lora": LORA_PARAMS, **one})
        found = checkpoints.restore({"lora": LORA_PARAMS, **zero})
        assert {name: type(x) for name, x in found.items()} == {"lora": dict, **{n: type(x) for n, x in one.items()}}
        chex.assert_trees_all_equal(found["average"], average)
        assert found["key"] == one["key"] and np.asarray(found["a.b: ü"][0], int).sum() == 2
        for name in ("tokens", "long", "name", "none", "yes", "rate"):
            assert found[name] == one[name]
        for odd, message in (
            (jnp.ones(2, "uint4"), "is uint4"),
            (np.array(["x"]), "is str32"),
            (jnp.ones((0, 2)), "has no entries"),
            (2**70, "is object"),
        ):
            with pytest.raises(ValueError, match=f"'odd' {message}, which a checkpoint cannot hold"):
                checkpoints.save(2, {"lora": LORA_PARAMS, "odd": odd})
        with pytest.raises(ValueError, match="no adapters are found in a dict .*: give Checkpoints lora_params="):
            checkpoints.save(2, {"lora": one})
    with Checkpoints(tmp_path / "bare", FROZEN["w"], lora_params=lambda state: state["lora"]) as checkpoints:
        bank = jax.tree.map(lambda x: jnp.stack([x, x]), LORA_PARAMS)
        checkpoints.save(1, {"lora": bank, "base": FROZEN["w"]})
        checkpoints.wait()
        assert manifest.newest(tmp_path / "bare")[2]["arrays"]["rest"] == {}
        chex.assert_trees_all_equal(load(tmp_path / "bare"), bank)


# What stays


def test_steps_go_up_and_the_best_stay(tmp_path):
    tree = {"lora": LORA_PARAMS}

    def opened():
        return Checkpoints(tmp_path, FROZEN, keep_last=1, keep_best=1, lora_params=lambda state: state["lora"])

    with opened() as checkpoints:
        for step, loss in ((1, 0.5), (2, jnp.bfloat16(0.25)), (3, jnp.ones(1))):
            checkpoints.save(step, tree, metrics={"eval_loss": loss, "other": "text"})
        checkpoints.wait()
        assert manifest.steps(tmp_path) == [2, 3]
    with opened() as checkpoints:
        for step in (1, 3):
            message = f"step {step} is not saved, since steps go up, and {tmp_path} is at 3: restore"
            with pytest.raises(ValueError, match=message):
                checkpoints.save(step, tree)
        checkpoints.save(4, tree, metrics={"eval_loss": np.nan})
    assert manifest.steps(tmp_path) == [2, 4]


def test_the_first_error_is_the_one_that_is_raised(tmp_path):
    with pytest.raises(RuntimeError, match="first") as raised, Checkpoints(tmp_path, FROZEN) as checkpoints:
        checkpoints.save(1, state(jax.tree.map(lambda x: x * jnp.nan, LORA_PARAMS)))
        raise RuntimeError("first")
    assert "besides" in raised.value.__notes__[0] and "not finite" in raised.value.__notes__[0]


def test_what_is_no_folder_of_checkpoints(folder, tmp_path):
    with pytest.raises(ValueError, match=r"orbax takes '\[' for a pattern"):
        Checkpoints(tmp_path / "run[1]", FROZEN)
    with pytest.raises(FileNotFoundError, match=f"3: no checkpoint is there, but it is one itself: give {folder}"):
        load(folder / "3")
    with pytest.raises(NotADirectoryError, match="adapter: a file, and no folder of checkpoints; lora_jax.load reads"):
        load(lora.save(tmp_path / "adapter", LORA_PARAMS))
    with pytest.raises(
        IsADirectoryError, match="give the file in it, or, if checkpoints are, .* lora_jax.formats.orbax"
    ):
        lora.load(folder)

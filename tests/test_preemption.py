"""A run that is stopped, killed, or finds its newest checkpoint damaged ends with the undisturbed run's bits."""

from __future__ import annotations

import functools
import itertools
import logging
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from lora_jax import training
from lora_jax.formats import manifest
from lora_jax.formats.orbax import Checkpoints

pytestmark = pytest.mark.standard_promotion

STEPS = 6
BATCHES = np.random.default_rng(0).normal(size=(STEPS, 4, 256)).astype("f")
FROZEN, LORA_PARAMS = lora.split(jax.random.key(0), {"w": jnp.ones((256, 128))}, {"w": lora.LoRA(2, dropout=0.5)})
TX = lora.optimizer(optax.adam(1e-2))
STEP = training.make_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), TX, clip_norm=1.0)


def state(lora_params=LORA_PARAMS, tx=TX):
    return training.State.create(jax.random.key(1), lora_params, tx)


def run(folder, steps=STEPS, hooks=(), **options):
    """The adapters of a run that goes on from what is in a folder."""
    with Checkpoints(folder, FROZEN, **{"every": 1, "keep_last": 3, **options}) as checkpoints:
        return training.fit(
            STEP, state(), FROZEN, BATCHES, steps=steps, hooks=hooks, checkpoints=checkpoints
        ).lora_params


@functools.cache
def undisturbed():
    return training.fit(STEP, state(), FROZEN, BATCHES, steps=STEPS).lora_params


def at(step, action):
    """A hook that acts after one step."""
    return lambda done, *_: (action(), None)[1] if done == step else None


def listed(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


# Stopped


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(number, status, tmp_path, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as found:
        run(tmp_path, hooks=[at(2, lambda: signal.raise_signal(number))], every=100)
    assert (found.value.code, found.value.step, manifest.steps(tmp_path)) == (status, 2, [2])
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after step 2, saved in {tmp_path}; to go on" in said
    assert said.endswith(f"  {shlex.join(sys.orig_argv)}\n")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    chex.assert_trees_all_equal(run(tmp_path), undisturbed())


class Late:
    """A hook whose state is asked for after the loop has asked for signals."""

    def __call__(self, *_):
        pass

    def get_state(self):
        signal.raise_signal(signal.SIGTERM)

    def set_state(self, _):
        pass


def test_a_second_signal_and_a_late_one_do_what_they_did(tmp_path):
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        twice = at(1, lambda: [signal.raise_signal(signal.SIGTERM) for _ in range(2)])
        with pytest.raises(training.Interrupted):
            run(tmp_path, hooks=[twice])
        assert came == [signal.SIGTERM]
        run(tmp_path / "late", 1, hooks=[Late()])
        assert came == [signal.SIGTERM] * 2 and manifest.steps(tmp_path / "late") == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_was_saved_is_written_though_the_loop_fails_and_outside_of_the_main_thread(tmp_path):
    """Where signals cannot be caught. The program may end before anybody closes the checkpoints."""
    found = []

    def fit():
        checkpoints = Checkpoints(tmp_path, FROZEN, every=2)
        with pytest.raises(ValueError, match="the data ended after 2 of 3 steps"):
            training.fit(STEP, state(), FROZEN, BATCHES[:2], steps=3, checkpoints=checkpoints)
        found.append(manifest.newest(tmp_path)[0])

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert found == [2]


# Killed


def killed(folder):
    """Saves step 1, has no room for step 2, then has, and dies in the middle of saving step 4."""
    run(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    with pytest.raises(OSError, match=rf"{folder}/2 could not be written: File too large. Checkpoints before it"):
        run(folder, 2)
    assert manifest.newest(folder)[0] == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(folder, 3)
    assert listed(folder) >= {Path("2"), Path("3")} and not [*folder.glob("*tmp*")]
    manifest.write = lambda *_: signal.raise_signal(signal.SIGKILL)
    run(folder, 4)


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    child = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert manifest.steps(tmp_path) == [1, 2, 3] and [*tmp_path.glob("4.orbax-checkpoint-tmp/adapter/*")]
    left = listed(tmp_path)
    with Checkpoints(tmp_path, FROZEN) as checkpoints:
        assert checkpoints.read(state()).step == 3
    assert listed(tmp_path) == left  # another process may be writing it
    chex.assert_trees_all_equal(run(tmp_path), undisturbed())
    assert manifest.steps(tmp_path) == [4, 5, 6] and not [*tmp_path.glob("*tmp*")]


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


if __name__ == "__main__":
    killed(Path(sys.argv[1]))

"""A run that is stopped or killed goes on, and ends with the undisturbed run's bits."""

from __future__ import annotations

import resource
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chex
import pytest
from tiny_run import BATCHES, FROZEN, STEP, listed, run, state, undisturbed

from lora_jax import training
from lora_jax.formats import manifest
from lora_jax.formats.orbax import Checkpoints

pytestmark = pytest.mark.standard_promotion  # Adam's


def at(step, action):
    """A hook that acts after one step."""
    return lambda done, *_: (action(), None)[1] if done == step else None


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
    with pytest.raises(
        OSError, match=rf"{folder}/2: not written \(File too large\): choose another disk, .*, and run again, to go on"
    ):
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


if __name__ == "__main__":
    killed(Path(sys.argv[1]))

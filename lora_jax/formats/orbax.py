"""Checkpoints of training: factors, their optimizer state and scalars, by orbax; base weights are never in them."""

from __future__ import annotations

import contextlib
import json
import math
import operator
import os
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from lora_jax.factors import LoraParams
from lora_jax.fingerprint import check_base, fingerprint
from lora_jax.formats import manifest
from lora_jax.formats.folder import before_exit, clear, not_written, opened
from lora_jax.formats.folder import found as found
from lora_jax.formats.folder import load as load
from lora_jax.formats.parts import Parts, adapters_of, check_finite, copied, placed, take_apart, templates
from lora_jax.placement import on_mesh


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: The steps that were taken.
      state: The state after them.
      position: What was saved with it of what is no array, such as where the data was; None if nothing was.
    """

    step: int
    state: Any
    position: Any


class Checkpoints:
    """The checkpoints of a run, in one folder. A context manager, which waits for the last save.

    A save costs the caller a copy, on the devices, of what it saves; all else is done in another thread. A checkpoint
    appears whole or not at all; it has a sum of each of its files, the adapters by themselves, the rules they were made
    by, and a fingerprint of the base. Arrays are restored to where those of the state lie that is to be filled: on
    another mesh, in another number of processes.

    The state is any pytree that has the adapters in it: `training.State`, or a Flax `TrainState`. A part of it that has
    the frozen tree's structure is not saved, and stays as it is when the rest is restored. Steps go up, and one
    run at a time writes to a folder.

    >>> import tempfile, jax, jax.numpy as jnp, optax, lora_jax as lora
    >>> frozen, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> state = {"lora": lora_params, "opt": lora.optimizer(optax.adam(1e-3)).init(lora_params)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(folder, frozen, lora_params=lambda state: state["lora"]) as checkpoints:
    ...         checkpoints.save(10, state)
    ...         checkpoints.wait()
    ...         state = checkpoints.restore(state)
    ...     load(folder)["w"].variant.rank
    2
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        frozen: Any,
        *,
        every: int = 100,
        keep_last: int = 2,
        keep_best: int = 0,
        metric: str = "eval_loss",
        mode: str = "min",
        lora_params: Callable[[Any], LoraParams] = operator.attrgetter("lora_params"),
    ):
        """Opens a folder, and makes it where there is none.

        Args:
          folder: Where; on storage that all processes see, if there are several.
          frozen: The base, of which a fingerprint is taken.
          every: After how many steps `fit` saves.
          keep_last: How many of the newest stay; with two, damage to the newest costs `every` steps.
          keep_best: How many stay besides, those of the best metric.
          metric: Which of the metrics that are given to `save`; one that is not finite, or missing, is never best.
          mode: Whether the "min" or the "max" of it is best.
          lora_params: Where in a state the adapters are.

        Raises:
          ValueError: For numbers or a mode that make no sense, or a path with one of `*?[` in it.
          OSError: The folder cannot be made.
        """
        if min(every, keep_last) < 1 or keep_best < 0 or mode not in ("min", "max"):
            raise ValueError(
                f"Checkpoints(every={every}, keep_last={keep_last}, keep_best={keep_best}, mode={mode!r}): every and "
                "keep_last are 1 or more, keep_best is 0 or more, mode is 'min' or 'max'"
            )
        self.folder, self.every = Path(folder).absolute(), every
        if odd := sorted({*"*?["} & {*str(self.folder)}):
            raise ValueError(
                f"{self.folder}: orbax takes {odd[0]!r} for a pattern, and checkpoints there could not be read: give a "
                "folder without it"
            )
        self._frozen, self._lora_params, self._base = frozen, lora_params, fingerprint(frozen)
        self._sign, self._metric = (1 if mode == "min" else -1), metric
        self._values: dict[int, float] = {}
        self._manifest: dict[str, Any] = {}
        self._pending: Future[None] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.folder}: no folder for checkpoints can be made there ({error.strerror}): give one that can be "
                "written to"
            ) from error
        for step, metrics in manifest.metrics(self.folder).items():
            self._note(step, metrics)
        self._manager = opened(self.folder, keep_last, keep_best, self._values, self._seal)
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "checkpoints")
        before_exit(weakref.WeakMethod(self.close))

    def save(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None, position: Any = None) -> None:
        """Starts to save a state; it may be donated right after.

        It waits for the save before, if that is not done.

        Args:
          step: The steps that were taken, by which the checkpoint is known.
          state: The state.
          metrics: Scalars; the best are kept by one of them.
          position: What is to be saved besides, of JSON's types; each process saves its own.

        Raises:
          ValueError: The step is there, or a later one; the state has no adapters, or the base in it, or an array of a
            kind that cannot be written; or the factors that the save before was of are not finite (which is looked at
            where there is one process).
          OSError: The save before failed.
        """
        self.wait()
        if self._thread is None:
            raise ValueError(f"the checkpoints in {self.folder} are closed: save before the `with` block ends")
        step, newest = operator.index(step), self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"step {step} is not saved, since steps go up, and {self.folder} is at {newest}: restore that, to go "
                "on from it, or save in another folder"
            )
        state, lora_params = adapters_of(state, self._lora_params)
        parts, _ = take_apart(state, self._frozen, lora_params)
        try:
            text = json.dumps(position)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"step {step} is not saved: its position, in which are the states of data and hooks, cannot be said in "
                f"JSON ({error}): have get_state return numbers, strings, lists and dicts"
            ) from error
        self._pending = self._thread.submit(self._write, step, copied(parts), lora_params, dict(metrics or {}), text)

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: It could not be written; the checkpoints before it are as they were.
          ValueError: As `save`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def read(self, state: Any) -> Restored | None:
        """The newest checkpoint that is intact, its arrays as those of `state` lie; None where the folder has none.

        A checkpoint that is not as it was written is put aside, as `damaged-STEP`, and said so.

        Args:
          state: A state like the saved one, of arrays or of `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: There are checkpoints, but none is intact; or it is of another base, of other rules, or of another
            optimizer, or of a later version.
        """
        self.wait()
        newest = manifest.agreed(self.folder)
        if newest is None:
            return None
        self._manager.reload()
        step, folder, about = newest
        state, lora_params = adapters_of(state, self._lora_params)
        parts, rebuilt = take_apart(state, self._frozen, lora_params)
        check_base(str(folder), about["base"], self._base)
        manifest.check(str(folder), about, manifest.described(parts, lora_params))
        items = {name: ocp.args.StandardRestore(templates(part)) for name, part in parts._asdict().items() if part}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        filled = {name: placed(part, found[name]) if part else {} for name, part in parts._asdict().items()}
        return Restored(step, rebuilt(Parts(**filled)), manifest.position(folder))

    def restore(self, state: Any) -> Any:
        """What `read` finds, or the state as it is where there is no checkpoint yet."""
        found = self.read(state)
        return found.state if found else state

    def close(self) -> None:
        """Waits for the last save, and ends the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self.wait()
        finally:
            thread.shutdown()
            with contextlib.suppress(Exception):  # orbax raises once more what a failed save has raised
                self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        try:
            self.close()
        except (OSError, ValueError) as failed:
            if error is None:
                raise
            error.add_note(f"besides, {failed}")  # what came first is what is told

    def _write(self, step: int, parts: Parts, lora_params: LoraParams, metrics: dict[str, Any], position: str) -> None:
        """All that takes time; runs in the thread. The arrays of the adapters may be gone, and are not looked at."""
        metrics = manifest.scalars(metrics)
        about = manifest.described(parts, lora_params)
        self._manifest = {"step": step, "base": self._base, **about, "metrics": metrics}
        self._note(step, metrics)
        items: dict[str, Any] = {
            name: ocp.args.StandardSave({path: x if on_mesh(x) else np.asarray(x) for path, x in part.items()})
            for name, part in parts._asdict().items()
            if part
        }
        check_finite(f"{self.folder}: step {step}", parts.adapter)
        try:
            clear(self.folder)
            items["position"] = ocp.args.JsonSave(json.loads(position))
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # orbax has no class of its own; ValueError, OSError, RuntimeError and others came
            clear(self.folder)
            raise not_written(self.folder / str(step), error) from error

    def _note(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._metric)
        if isinstance(value, int | float) and math.isfinite(value):
            self._values[step] = self._sign * value

    def _seal(self) -> None:
        """Writes the manifest into what is written, before it gets its name; by one process, once all are done."""
        (folder,) = self.folder.glob(f"{self._manifest['step']}.*tmp*")
        manifest.write(folder, self._manifest)

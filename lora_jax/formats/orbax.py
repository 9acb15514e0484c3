"""Checkpoints of training: factors, their optimizer state and scalars, by orbax; base weights are never in them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import operator
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from lora_jax.factors import LoraParams
from lora_jax.fingerprint import check_base, fingerprint
from lora_jax.formats import description, manifest
from lora_jax.formats.parts import Parts, take_apart
from lora_jax.placement import on_mesh

_OPENED = itertools.count()  # names the barriers of each folder's processes, which open folders in one order


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
    the frozen tree's structure is not saved, and stays as it is when the rest is restored.

    >>> import tempfile, optax, lora_jax as lora
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
          ValueError: For numbers or a mode that make no sense.
          OSError: The folder cannot be made.
        """
        if min(every, keep_last) < 1 or keep_best < 0 or mode not in ("min", "max"):
            raise ValueError(
                f"Checkpoints(every={every}, keep_last={keep_last}, keep_best={keep_best}, mode={mode!r}): every and "
                "keep_last are 1 or more, keep_best is 0 or more, mode is 'min' or 'max'"
            )
        self.folder, self.every = Path(folder).absolute(), every
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
        self._manager = self._opened(AnyPreservationPolicy([LatestN(keep_last), _Best(keep_best, self._values)]))
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "checkpoints")
        _before_exit(weakref.WeakMethod(self.close))

    def save(self, step: int, state: Any, *, metrics: Mapping[str, Any] | None = None, position: Any = None) -> None:
        """Starts to save a state; it may be donated right after.

        It waits for the save before, if that is not done.

        Args:
          step: The steps that were taken, by which the checkpoint is known.
          state: The state.
          metrics: Scalars; the best are kept by one of them.
          position: What is to be saved besides, of JSON's types; each process saves its own.

        Raises:
          ValueError: The state has no adapters, or the base in it.
          OSError: The save before failed.
        """
        self.wait()
        lora_params = self._adapters(state)
        parts, _ = take_apart(state, self._frozen, lora_params)
        if self._thread is None:
            raise ValueError(f"the checkpoints in {self.folder} are closed: save before the `with` block ends")
        self._pending = self._thread.submit(
            self._write, step, _copied(parts), lora_params, dict(metrics or {}), json.dumps(position)
        )

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: It could not be written; the checkpoints before it are as they were.
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
        lora_params = self._adapters(state)
        parts, rebuilt = take_apart(state, self._frozen, lora_params)
        check_base(str(folder), about["base"], self._base)
        manifest.check(str(folder), about, manifest.described(parts, lora_params))
        items = {name: ocp.args.StandardRestore(_templates(part)) for name, part in parts._asdict().items() if part}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        filled = {name: _placed(part, found[name]) if part else {} for name, part in parts._asdict().items()}
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

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write(self, step: int, parts: Parts, lora_params: LoraParams, metrics: dict[str, Any], position: str) -> None:
        """All that takes time; runs in the thread. The arrays of the adapters may be gone, and are not looked at."""
        metrics = {name: float(x) for name, x in metrics.items()}
        about = manifest.described(parts, lora_params)
        self._manifest = {"step": step, "base": self._base, **about, "metrics": metrics}
        self._note(step, metrics)
        items: dict[str, Any] = {
            name: ocp.args.StandardSave({path: x if on_mesh(x) else np.asarray(x) for path, x in part.items()})
            for name, part in parts._asdict().items()
            if part
        }
        try:
            self._clear()
            if step in self._manager.all_steps():
                self._manager.delete(step)
            items["position"] = ocp.args.JsonSave(json.loads(position))
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # whatever orbax and tensorstore raise
            self._clear()
            raise OSError(
                f"{self.folder / str(step)} could not be written: {_cause(error)}. Checkpoints before it are as they "
                "were: when the folder has room and can be written to, save again, or run again, to go on from them"
            ) from error

    def _clear(self) -> None:
        """Deletes what saves have left that were killed or failed, some of whose threads may write on for a while."""
        for left in self.folder.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
            shutil.rmtree(left, ignore_errors=True)

    def _adapters(self, state: Any) -> LoraParams:
        try:
            return self._lora_params(state)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"no adapters are found in a {type(state).__name__} ({error}): give Checkpoints lora_params=, a "
                "function from a state to the adapters in it"
            ) from error

    def _note(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._metric)
        if isinstance(value, int | float) and math.isfinite(value):
            self._values[step] = self._sign * value

    def _opened(self, policy: Any) -> ocp.CheckpointManager:
        several = jax.process_count() > 1
        # Named processes meet at barriers of the runtime's; else all devices would, amid what they compute.
        processes = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())) if several else None,
            barrier_sync_key_prefix=f"lora_jax_{next(_OPENED)}" if several else None,
        )
        own = ocp.options.MultiprocessingOptions(primary_host=None)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            create=False,  # it is there; orbax makes none for named processes
            save_root_metadata=False,
            multiprocessing_options=processes,
            async_options=ocp.options.AsyncOptions(  # what folders wait for is told apart by a counter of all savers'
                post_finalization_callback=self._seal, create_directories_asynchronously=False
            ),
        )
        handlers = {
            "adapter": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            "rest": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            "position": ocp.JsonCheckpointHandler(f"process_{jax.process_index()}.json", multiprocessing_options=own),
        }
        return _Manager(self.folder, options=options, item_names=tuple(handlers), item_handlers=handlers)

    def _seal(self) -> None:
        """Writes the manifest into what is written, before it gets its name; by one process, once all are done."""
        (folder,) = self.folder.glob(f"{self._manifest['step']}.*tmp*")
        manifest.write(folder, self._manifest)


def _before_exit(close: Callable[[], Callable[[], None] | None]) -> None:
    """Has the last save of whoever did not wait for it end, or fail, before Python's threads do.

    Otherwise orbax waits minutes for threads that no longer start; `atexit` comes after those have ended. Python 3.12
    starts no thread any more even here, so that the save may fail: then it says so.
    """
    getattr(threading, "_register_atexit", atexit.register)(lambda: (alive := close()) and alive())


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Asked by the thread, of a step that is past: whether to stop is for the loop to ask."""
        return False


class _Best(NamedTuple):
    """Keeps the steps of the least values."""

    number: int
    values: Mapping[int, float]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        known = [info.step for info in checkpoints if info.step in self.values]
        best = sorted(known, key=lambda step: self.values[step])[: self.number]
        return [info.step in best for info in checkpoints]


def load(folder: str | os.PathLike[str], step: int | None = None) -> LoraParams:
    """The adapters of a checkpoint, without its base or its optimizer state, whole, as NumPy's arrays.

    Args:
      folder: As of `Checkpoints`.
      step: Which; None for the newest that is intact.

    Raises:
      FileNotFoundError: There is no such checkpoint.
      ValueError: It is damaged, or of a later version.
    """
    folder = Path(folder).absolute()
    if step is None:
        newest = manifest.newest(folder)
        if newest is None:
            raise FileNotFoundError(f"{folder}: no checkpoint there")
        step, place, about = newest
    else:
        place = folder / str(step)
        about = manifest.read(place)
    shapes = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in about["arrays"]["adapter"].items()}
    this = jax.process_index()  # of several processes, one may read by itself
    own = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=str(this)
    )
    with ocp.StandardCheckpointer(multiprocessing_options=own) as checkpointer:
        found = checkpointer.restore(place / "adapter", _templates(shapes))
    lora_params = jax.tree.map(found.__getitem__, description.restore(about["adapters"]))
    description.check(lora_params)
    return lora_params


def _cause(error: Exception) -> str:
    """What went wrong, of an error that may begin with how tensorstore came to it, and end with all it was told."""
    return getattr(error, "strerror", None) or str(error).split(" [")[0].rsplit(": ", 1)[-1]


@jax.jit
def _copies(arrays: Any) -> Any:
    return jax.tree.map(jnp.copy, arrays)


def _copied(parts: Parts) -> Parts:
    """What a step may then donate, or others change: copied where it lies, without waiting for it to be there."""

    def copied(part: Mapping[str, Any]) -> dict[str, Any]:
        groups: dict[Any, dict[str, Any]] = {}  # a program for all arrays on the same devices
        for name, x in part.items():
            if isinstance(x, jax.Array):
                groups.setdefault(getattr(x.sharding, "mesh", x.sharding), {})[name] = x
        copies = {name: x for group in groups.values() for name, x in _copies(group).items()}
        return {name: copies[name] if name in copies else np.array(x) for name, x in part.items()}

    return Parts(*map(copied, parts))


def _templates(part: Mapping[str, Any]) -> dict[str, Any]:
    """How orbax is to give each array: as it lies on a mesh, or else NumPy's."""
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        if (place := on_mesh(x))
        else np.empty(x.shape, x.dtype)
        for name, x in part.items()
    }


def _placed(part: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays on the device that those of a part lie on."""

    def place(like: Any, x: Any) -> Any:
        if on_mesh(like) or isinstance(like, np.ndarray):
            return x
        return jax.device_put(x, like.sharding if getattr(like, "committed", False) else None)

    return {name: place(like, found[name]) for name, like in part.items()}

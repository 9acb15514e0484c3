"""A folder of checkpoints, as orbax keeps it: how several processes write it, what stays, what is left of failures."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN

from lora_jax.factors import LoraParams
from lora_jax.formats import atomic, description, manifest
from lora_jax.formats.parts import templates

_OPENED = itertools.count()  # names the barriers of each folder's processes, which open folders in one order


def opened(
    folder: Path, keep_last: int, keep_best: int, values: Mapping[int, float], seal: Callable[[], None]
) -> ocp.CheckpointManager:
    """orbax's manager of a folder that is there.

    Args:
      folder: The folder.
      keep_last: How many of the newest stay.
      keep_best: How many stay besides, those of the least value.
      values: By step.
      seal: Called by one process when all is written, before it gets its name.
    """
    several = jax.process_count() > 1
    # Named processes meet at barriers of the runtime's; else all devices would, amid what they compute.
    processes = ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())) if several else None,
        barrier_sync_key_prefix=f"lora_jax_{next(_OPENED)}" if several else None,
    )
    own = ocp.options.MultiprocessingOptions(primary_host=None)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(keep_last), _Best(keep_best, values)]),
        create=False,  # it is there; orbax makes none for named processes
        save_root_metadata=False,
        multiprocessing_options=processes,
        async_options=ocp.options.AsyncOptions(  # what folders wait for is told apart by a counter of all savers'
            post_finalization_callback=seal, create_directories_asynchronously=False
        ),
    )
    handlers = {
        "adapter": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "rest": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "position": ocp.JsonCheckpointHandler(f"process_{jax.process_index()}.json", multiprocessing_options=own),
    }
    return _Manager(folder, options=options, item_names=tuple(handlers), item_handlers=handlers)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Asked by the thread, of a step that is past: whether to stop is for the loop to ask."""
        return False


class _Best(NamedTuple):
    number: int
    values: Mapping[int, float]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        known = [info.step for info in checkpoints if info.step in self.values]
        best = sorted(known, key=lambda step: self.values[step])[: self.number]
        return [info.step in best for info in checkpoints]


def clear(folder: Path) -> None:
    """Deletes what saves have left that were killed or failed, some of whose threads may write on for a while."""
    for left in folder.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
        shutil.rmtree(left, ignore_errors=True)


def not_written(place: Path, error: Exception) -> OSError:
    """What the operating system has said, which tensorstore tells amid much else."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None) or 0
    cause = os.strerror(number) if number else error
    remedy = atomic.REMEDIES.get(number, "see to the cause")
    message = f"{place}: not written ({cause}): {remedy}, and run again, to go on from the checkpoints before it"
    return OSError(number, message) if number else OSError(message)


def before_exit(close: Callable[[], Callable[[], None] | None]) -> None:
    """Has the last save of whoever did not wait for it end, or fail, before Python's threads do.

    Otherwise orbax waits minutes for threads that no longer start; `atexit` comes after those have ended. Python 3.12
    starts no thread any more even here, so that the save may fail: then it says so.
    """
    getattr(threading, "_register_atexit", atexit.register)(lambda: (alive := close()) and alive())


def found(folder: str | os.PathLike[str], step: int | None = None) -> tuple[int, Path, dict[str, Any]]:
    """A checkpoint: its step, its folder, and its manifest; the arguments and errors are those of `load`."""
    folder = Path(folder).absolute()
    newest = manifest.newest(folder) if step is None else manifest.at(folder, step)
    if newest is None:
        inside = f", but it is one itself: give {folder.parent}" if (folder / manifest.NAME).exists() else ""
        raise FileNotFoundError(f"{folder}: no checkpoint is there{inside}")
    return newest


def load(folder: str | os.PathLike[str], step: int | None = None) -> LoraParams:
    """The adapters of a checkpoint, without its base or its optimizer state, whole, as NumPy's arrays.

    Args:
      folder: As of `lora_jax.Checkpoints`.
      step: Which; None for the newest that is intact.

    Raises:
      FileNotFoundError: There is no such checkpoint.
      ValueError: It is damaged, or of a later version.
    """
    _, place, about = found(folder, step)
    shapes = {n: jax.ShapeDtypeStruct(shape, dtype) for n, (dtype, shape) in about["arrays"]["adapter"].items()}
    this = jax.process_index()  # of several processes, one may read by itself
    own = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=str(this)
    )
    with ocp.StandardCheckpointer(multiprocessing_options=own) as checkpointer:
        arrays = checkpointer.restore(place / "adapter", templates(shapes))
    return jax.tree.map(arrays.__getitem__, description.restore(about["adapters"]))

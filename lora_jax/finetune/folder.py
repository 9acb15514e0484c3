"""Folder: what a run leaves in its directory, and what a run that was cut off finds there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lora_jax
from lora_jax.finetune.configuration import as_json, written
from lora_jax.finetune.data.rows import Rows
from lora_jax.finetune.settings import Settings
from lora_jax.formats import atomic

UNFINISHED = "unfinished.json"  # is there from the first step until all else is
SETTINGS, LOG, FIGURE, ADAPTER = "train.yaml", "log.jsonl", "loss.png", "adapter.safetensors"
CHECKPOINTS, BEST = "checkpoints", "best.safetensors"


class Unfinished(NamedTuple):
    """What is known of a run that was cut off.

    Attributes:
      before: Its evaluation before the first step; None without one.
      done: What it found, if all but cleaning up is done.
      date: The day on which it began, which its chats may name.
    """

    before: dict[str, float] | None
    done: dict[str, Any] | None
    date: str | None


def check(out: str, settings: Settings) -> Unfinished | None:
    """Whether there is a run to go on with; None for a new one.

    Raises:
      OSError: The directory cannot be made or written to, or holds something else.
      ValueError: It holds a run of other settings, or its name is one in which checkpoints cannot be.
    """
    folder = Path(out)
    if odd := sorted({*"*?["} & {*str(folder.absolute())}):
        raise ValueError(f"--out {out}: orbax, which writes checkpoints, takes {odd[0]!r} for a pattern: leave it out")
    if not folder.exists():
        parent = folder.absolute().parent
        if not parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {parent}: make it first")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"--out {out}: {parent} cannot be written to: choose another folder")
        return None
    if not folder.is_dir():
        raise FileExistsError(f"--out {out}: it is a file: give the name of a directory that is not there yet")
    if not any(folder.iterdir()):
        return None
    if not (folder / UNFINISHED).is_file():
        what = "a finished run" if (folder / SETTINGS).is_file() else "something else than a run"
        raise FileExistsError(f"--out {out}: it holds {what}: give another directory, or remove this one")
    known = json.loads((folder / UNFINISHED).read_text())
    ours, theirs = as_json(settings), known["settings"]
    free = {"out"} if settings.date else {"out", "date"}
    for name in (name for name in {**theirs, **ours} if name not in free and ours.get(name) != theirs.get(name)):
        was, now = (json.dumps(x.get(name), ensure_ascii=False) for x in (theirs, ours))
        raise ValueError(
            f"--out {out}: it holds an unfinished run with {name} {was}, and this one has {now}: give the same to go "
            "on with it, or another --out"
        )
    return Unfinished(known["before"], known.get("done"), theirs.get("date"))


def check_data(out: str, digest: str) -> None:
    """Raises where the data is not what an unfinished run began with.

    Raises:
      ValueError: So it is.
    """
    known = json.loads((Path(out) / UNFINISHED).read_text())["data"]
    if known != digest:
        raise ValueError(
            f"--out {out}: it holds an unfinished run on other data: the files' content has changed since, or the "
            "tokenizer's: put it back to go on, or give another --out"
        )


def check_space(out: str, needed: int) -> None:
    """Raises where the disk has no room for what a run will write.

    Raises:
      OSError: So it is.
    """
    folder = Path(out).absolute()
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    if free < needed:
        raise OSError(
            f"--out {out}: the run writes up to {needed / 1e6:.3g} MB, and {free / 1e6:.3g} MB are free: free some "
            "space, or choose another disk"
        )


def digest(parts: Iterable[Rows | None]) -> str:
    """A hash of all rows, by which data is known again."""
    found = hashlib.sha256()
    for rows in parts:
        arrays = {} if rows is None else {**rows.columns, "starts": rows.starts, "labels": rows.labels}
        for name, x in arrays.items():
            if x is not None:
                found.update(f"{name} {x.dtype} {x.shape} ".encode())
                found.update(np.ascontiguousarray(x).data)
        found.update(b"|")
    return found.hexdigest()


def begin(out: str, settings: Settings, data: str, before: Mapping[str, float] | None) -> None:
    """Makes the directory, with its settings, at once.

    Raises:
      OSError: It cannot be made.
    """
    with atomic.directory(out) as new:
        (new / SETTINGS).write_text(written(settings), encoding="utf-8")
        (new / UNFINISHED).write_text(_json(settings, data, before))


def done(out: str, settings: Settings, data: str, before: Mapping[str, float] | None, found: Mapping[str, Any]) -> None:
    """Notes that all is written but what cleaning up takes away."""
    atomic.write(Path(out) / UNFINISHED, _json(settings, data, before, done=found).encode())


def clean(out: str, keep_checkpoints: bool) -> None:
    """Takes away what an unfinished run has besides."""
    folder = Path(out)
    if not keep_checkpoints:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    for name in (BEST, UNFINISHED):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()


def _json(settings: Settings, data: str, before: Any, **more: Any) -> str:
    about = {"lora_jax": lora_jax.__version__, "settings": as_json(settings), "data": data, "before": before, **more}
    return json.dumps(about, ensure_ascii=False, indent=1) + "\n"

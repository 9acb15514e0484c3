"""What a checkpoint says of itself: a JSON file, with a sum of every other file, so that damage is told at once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import lora_jax
from lora_jax import tree
from lora_jax.factors import LoraParams
from lora_jax.formats import atomic
from lora_jax.formats.description import describe
from lora_jax.formats.parts import Parts

NAME = "lora_jax.json"
FORMAT = 1
# What orbax writes anew after everything else, and says nothing of what is in the arrays.
UNSUMMED = {NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}
_NONE, _FAILED = -1, -2  # in place of a step, which no process then has


class DamagedError(ValueError):
    """A checkpoint is not as it was written, or was not written to its end."""


log = logging.getLogger("lora_jax")


def described(parts: Parts, lora_params: LoraParams) -> dict[str, Any]:
    """What a manifest says of a state: its adapters' variants and axes, and each array's dtype and shape."""
    arrays = {
        name: {path: [str(x.dtype), [*x.shape]] for path, x in part.items()} for name, part in parts._asdict().items()
    }
    versions = {"lora_jax": lora_jax.__version__, "jax": jax.__version__}
    return json.loads(json.dumps({"adapters": describe(lora_params), "arrays": arrays, "versions": versions}))


def check(where: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint was made by other rules than a state, or with another optimizer."""
    remedy = "split by the rules that it was made by, or start in another folder"
    _compare(where, "adapters", saved["adapters"], own["adapters"], remedy)
    _compare(where, "factors", saved["arrays"]["adapter"], own["arrays"]["adapter"], remedy)
    remedy = "take the optimizer that it was made with, or start from its adapters alone, lora_jax.formats.orbax.load"
    was, now = ({p: _counted(form) for p, form in of["arrays"]["rest"].items()} for of in (saved, own))
    _compare(where, "arrays beside the adapters", was, now, remedy)


def _counted(form: list[Any]) -> list[Any]:
    """A count of steps may be Python's int, or JAX's."""
    return ["int32", []] if form == ["int64", []] else form


def _compare(where: str, what: str, saved: Mapping[str, Any], own: Mapping[str, Any], remedy: str) -> None:
    saved, own = (tree.flatten(x, is_leaf=lambda x: x is None or isinstance(x, list))[0] for x in (saved, own))
    differing = [path for path in (*saved, *(p for p in own if p not in saved)) if saved.get(path) != own.get(path)]
    if not differing:
        return
    path = differing[0]
    if path in saved and path in own:
        cause = f"{path!r} was {saved[path]} and is {own[path]}"
    elif path in saved:
        cause = f"{path!r} is in the checkpoint alone{tree.close_to(path, own)}"
    else:
        cause = f"{path!r} is not in the checkpoint{tree.close_to(path, saved)}"
    raise ValueError(f"{where}: its {what} do not fit ({len(differing)} of them; {cause}): {remedy}")


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Puts the manifest beside the files that are in a folder, the sums of which it holds."""
    content = {"format": FORMAT, **manifest, "files": _sums(folder)}
    text = json.dumps(content, sort_keys=True)
    (folder / NAME).write_text(json.dumps({"sum": _sum(text.encode()), "manifest": content}, sort_keys=True))
    for path in (folder, *folder.rglob("*")):  # down to the disk before those it replaces are deleted
        atomic.keep(path)


def read(folder: Path, files: bool = True) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were, unless another process has told that they are.

    Raises:
      DamagedError: A file is missing, or other than it was; or there is no manifest, which is written last.
      ValueError: It was written by a later version.
    """
    try:
        held = json.loads((folder / NAME).read_bytes())
        manifest = held["manifest"]
        whole = held["sum"] == _sum(json.dumps(manifest, sort_keys=True).encode())
    except FileNotFoundError as error:
        raise DamagedError(f"{NAME}, which is written last, is missing") from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedError(f"{NAME} cannot be read ({type(error).__name__}: {error})") from error
    if not whole:
        raise DamagedError(f"{NAME} is not as it was written")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{folder}: format {manifest['format']}, and this version reads format {FORMAT}: update lora_jax"
        )
    try:
        found = _sums(folder) if files else manifest["files"]
    except OSError as error:  # of the disk's, say
        raise DamagedError(f"{error.filename or folder} cannot be read ({error.strerror})") from error
    for name, its in manifest["files"].items():
        if found.get(name) != its:
            raise DamagedError(f"{name} is {'not as it was written' if name in found else 'missing'}")
    return manifest


def newest(folder: Path, put_aside: bool = False) -> tuple[int, Path, dict[str, Any]] | None:
    """The newest checkpoint that is intact: its step, its folder and its manifest; None where there is none at all.

    Raises:
      ValueError: There are checkpoints, and all are damaged; or it is of a later version.
    """
    damaged = {}
    for step in reversed(steps(folder)):
        place = folder / str(step)
        try:
            about = read(place)
        except DamagedError as error:
            damaged[step] = str(error)
            continue
        for other, cause in damaged.items():
            log.warning("%s is damaged (%s): going on from step %d", folder / str(other), cause, step)
            if put_aside:
                with contextlib.suppress(OSError):  # where nothing can be written, it is passed over each time
                    (folder / str(other)).rename(_free(folder / f"damaged-{other}"))
        return step, place, about
    if damaged:
        said = "; ".join(f"step {step}: {cause}" for step, cause in damaged.items())
        raise ValueError(f"{folder}: no checkpoint is intact ({said}): start in another folder")
    return None


def at(folder: Path, step: int) -> tuple[int, Path, dict[str, Any]]:
    """The checkpoint of a step, if it is intact.

    Raises:
      FileNotFoundError: There is none.
      ValueError: It is damaged, or of a later version.
    """
    place, others = folder / str(step), steps(folder)
    if step not in others:
        raise FileNotFoundError(f"{place}: no such checkpoint; in its folder are those of steps {others}")
    try:
        return step, place, read(place)
    except DamagedError as error:
        raise ValueError(f"{place} is damaged ({error}): take another of steps {others}") from error


def agreed(folder: Path) -> tuple[int, Path, dict[str, Any]] | None:
    """As `newest`, what is damaged put aside; of several processes, which all call it, the first decides for all.

    Were each to look for itself, one could see what another has just put aside.

    Raises:
      ValueError: As `newest`.
    """
    if jax.process_count() == 1:
        return newest(folder, put_aside=True)
    found, told = None, _FAILED
    try:
        if jax.process_index() == 0:
            found = newest(folder, put_aside=True)
            told = _NONE if found is None else found[0]
    finally:  # the others wait for a word
        with jax.set_mesh(Mesh(np.empty((), object), ())):  # whatever mesh is set
            step = int(multihost_utils.broadcast_one_to_all(np.int32(told)))
    if step == _FAILED:
        raise ValueError(f"{folder}: process 0 finds no checkpoint to go on from, and has said why")
    if jax.process_index() == 0 or step == _NONE:
        return found
    return step, folder / str(step), read(folder / str(step), files=False)


def position(folder: Path) -> Any:
    """What this process saved, or, where others did, what they all did.

    Raises:
      ValueError: They were of another number, and did not save the same.
    """
    files = sorted((folder / "position").glob("process_*.json"))
    own = folder / "position" / f"process_{jax.process_index()}.json"
    texts = {file.read_text() for file in files}
    if len(files) == jax.process_count() and own in files:
        return json.loads(own.read_text())
    if len(texts) == 1:
        return json.loads(texts.pop())
    raise ValueError(
        f"{folder}: {len(files)} processes saved different positions in their data, and now there are "
        f"{jax.process_count()}: go on with as many, or start the data anew"
    )


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those metrics that are one real number, of whatever dtype."""
    arrays = {name: np.asarray(x) for name, x in metrics.items()}
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return {
        name: float(x.item())
        for name, x in arrays.items()
        if x.size == 1 and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)
    }


def metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each checkpoint that has a manifest, by step."""
    found = {}
    for step in steps(folder):
        try:
            found[step] = dict(json.loads((folder / str(step) / NAME).read_bytes())["manifest"]["metrics"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # damaged, which is for `newest` to say
    return found


def steps(folder: Path) -> list[int]:
    """The steps of a folder's checkpoints, ascending."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: a file, and no folder of checkpoints; lora_jax.load reads adapter files")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of checkpoints")
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _free(path: Path) -> Path:
    """The path, or one like it that is not taken."""
    taken = (path.with_name(f"{path.name}-{i}") for i in itertools.count(1))
    return path if not path.exists() else next(other for other in taken if not other.exists())


def _sums(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in UNSUMMED)
    return {file.relative_to(folder).as_posix(): _sum(file.read_bytes()) for file in files}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Deferred: a checkpoint's parameters by path, read from the disk when they are asked for; and which they are."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.fingerprint import fingerprint_of
from lora_jax.formats.huggingface.checkpoint import Checkpoint
from lora_jax.formats.huggingface.filling import located, outline, part_dimension, read_entry, stacked
from lora_jax.formats.huggingface.tensors import Lazy
from lora_jax.formats.names import Names, Place


def deferred(params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None) -> Any:
    """What `fill` would return with these arguments, with a `Lazy` at each leaf: `np.asarray` reads that leaf alone.

    Args:
      params: The parameters, or their shapes.
      checkpoint: What `open_checkpoint` returned.
      names: The model's list.
      dtype: What to cast every parameter to; None keeps each as it is stored.

    Raises:
      CheckpointError: As `outline`.
      ValueError: As `outline`.

    >>> import tempfile, jax
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> from lora_jax.formats.huggingface import open_checkpoint
    >>> directory = Path(tempfile.mkdtemp())
    >>> _ = (directory / "config.json").write_text("{}")
    >>> save_file({"up.weight": np.ones((3, 2), np.float32)}, directory / "model.safetensors")
    >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    >>> np.asarray(deferred(shapes, open_checkpoint(directory), [("up", "up", "linear")])["up"]["kernel"]).shape
    (2, 3)
    """
    leaves, treedef = tree.flatten(outline(params, checkpoint, names, dtype))
    places = located(leaves, names)

    def leaf(path: str) -> Lazy:
        own = np.dtype(leaves[path].dtype)
        return Lazy(places[path].shape, own, functools.partial(_made, checkpoint, places[path], own))

    return tree.unflatten(treedef, {path: leaf(path) for path in leaves})


def fingerprint(params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None) -> dict[str, str]:
    """What `lora_jax.fingerprint` says of the parameters that `fill` would return; a few entries of each are read.

    Args:
      params: As in `deferred`.
      checkpoint: As in `deferred`.
      names: As in `deferred`.
      dtype: As in `deferred`.

    Returns:
      A dict from path to a string, in the order of the tree.

    Raises:
      CheckpointError: As `outline`.
      ValueError: As `outline`.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lora
    >>> from lora_jax.formats.huggingface import open_checkpoint, save
    >>> params, names = {"up": {"kernel": jnp.ones((2, 3))}}, [("up", "up", "linear")]
    >>> directory = save(f"{tempfile.mkdtemp()}/model", params, names, config={})
    >>> fingerprint(params, open_checkpoint(directory), names) == lora.fingerprint(params)
    True
    """
    leaves, _ = tree.flatten(outline(params, checkpoint, names, dtype))
    places = located(leaves, names)

    def of(path: str) -> str:
        own = np.dtype(leaves[path].dtype)
        return fingerprint_of(own, places[path].shape, lambda at: _entries(checkpoint, places[path], at).astype(own))

    return {path: of(path) for path in leaves}


def _made(checkpoint: Checkpoint, place: Place, dtype: np.dtype[Any]) -> np.ndarray:
    """A leaf, of the tensors that hold it."""
    dims = stacked(place)
    if not dims:
        return read_entry(checkpoint.tensors[place.tensors[()]], place, dtype)
    leaf = np.empty(place.shape, dtype)
    for index, name in place.tensors.items():
        where = tuple(index[dims.index(d)] if d in dims else slice(None) for d in range(leaf.ndim))
        leaf[where] = read_entry(checkpoint.tensors[name], place, dtype)
    return leaf


def _entries(checkpoint: Checkpoint, place: Place, positions: np.ndarray) -> np.ndarray:
    """Entries of a leaf, by their positions in it."""
    if not len(positions):
        return np.empty(0, next(iter(checkpoint.tensors[name].dtype for name in place.tensors.values())))
    where = dict(zip(place.axes, np.unravel_index(positions, place.shape), strict=True)) if place.shape else {}
    theirs = np.zeros(len(positions), np.int64)
    for d, (group, size) in enumerate(zip(place.groups, place.theirs, strict=True)):
        own = np.zeros(len(positions), np.int64)
        for axis in group:
            own = own * place.sizes[axis] + where[axis]
        if place.part is not None and d == part_dimension(place):
            own += place.part[0]
        theirs = theirs * size + own
    holders = np.array([where[axis] for axis in place.stacked], np.int64).reshape(-1, len(positions)).T
    found = np.empty(len(positions), checkpoint.tensors[next(iter(place.tensors.values()))].dtype)
    for index, name in place.tensors.items():
        chosen = np.flatnonzero((holders == np.array(index, np.int64)).all(axis=1))
        if chosen.size:
            found[chosen] = checkpoint.tensors[name].entries(theirs[chosen])
    return found

"""Filling: a checkpoint's tensors become parameters, one after the other, each on the devices that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.formats.huggingface import slices
from lora_jax.formats.huggingface.checkpoint import Checkpoint
from lora_jax.formats.huggingface.directory import raise_if
from lora_jax.formats.huggingface.tensors import Tensor, rows_of_block, same_bits
from lora_jax.formats.names import Names, Place, locate
from lora_jax.placement import by_path, check_fits, is_spec, on_mesh

DTYPES = ("F64", "F32", "F16", "BF16")


def fill(
    params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None, *, shardings: Any = None
) -> Any:
    """Fill the parameters from a checkpoint, with nothing left empty and nothing left over.

    One tensor at a time is read, and goes to the devices that hold it: beyond what is loaded, the host needs memory for
    the largest alone. A head of tied embeddings that is there all the same must be the embeddings, bit for bit.

    Args:
      params: The parameters, or their shapes as `jax.eval_shape(model.init, ...)` gives them.
      checkpoint: What `open_checkpoint` returned.
      names: The model's list.
      dtype: What to cast every parameter to; None keeps each as it is stored.
      shardings: Where the parameters go: a tree like params of `jax.sharding.Sharding`, as
        `lora_jax.match_partition_rules` makes it for a mesh; one for all; or a function of the shapes that returns
        such, as is `functools.partial(lora_jax.match_partition_rules, rules, mesh=mesh)`. None: where params lie on a
        mesh, or else on the default device.

    Returns:
      The tree of `params`, holding a `jax.Array` at each leaf.

    Raises:
      CheckpointError: Parameters are missing, or tensors are left over or misshapen; the one error lists them all.
      ValueError: dtype is not floating, a path has no name, or a sharding does not fit.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> from lora_jax.formats.huggingface import open_checkpoint
    >>> directory = Path(tempfile.mkdtemp())
    >>> _ = (directory / "config.json").write_text("{}")
    >>> save_file({"up.weight": np.ones((3, 2), np.float32)}, directory / "model.safetensors")
    >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    >>> fill(shapes, open_checkpoint(directory), names=[("up", "up", "linear")])["up"]["kernel"].shape
    (2, 3)
    """
    leaves, treedef, places, where, ties = _fitting(params, checkpoint, names, dtype, shardings)
    _check_ties(checkpoint, ties)
    uses = [
        (checkpoint.tensors[name], path, index)
        for path, place in places.items()
        for index, name in place.tensors.items()
    ]
    filled: dict[str, Any] = dict.fromkeys(leaves)
    for tensor, path, index in sorted(uses, key=lambda use: (use[0].file, use[0].start)):
        place = places[path]
        x = read_entry(tensor, place, jnp.dtype(dtype or tensor.dtype))
        done = slices.put(filled[path], x, stacked(place), index, place.shape, where[path])
        filled[path] = jax.block_until_ready(done)  # else several would be on their way, and in memory
        del x, done
    return tree.unflatten(treedef, filled)


def outline(
    params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None, *, shardings: Any = None
) -> Any:
    """What `fill` would return with these arguments, as `jax.ShapeDtypeStruct` with shardings; no value is read.

    Raises:
      CheckpointError: As `fill`, but that a second copy of tied embeddings is not compared.
      ValueError: As `fill`.
    """
    leaves, treedef, places, where, _ = _fitting(params, checkpoint, names, dtype, shardings)

    def shape(path: str) -> jax.ShapeDtypeStruct:
        stored = checkpoint.tensors[next(iter(places[path].tensors.values()))].dtype
        return jax.ShapeDtypeStruct(leaves[path].shape, dtype or stored, sharding=where[path])

    return tree.unflatten(treedef, {path: shape(path) for path in leaves})


def verified(params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None) -> dict[str, Place]:
    """Where each leaf is in a checkpoint, with all that `fill` checks checked.

    Raises:
      CheckpointError: As `fill`.
      ValueError: As `fill`.
    """
    _, _, places, _, ties = _fitting(params, checkpoint, names, dtype, None)
    _check_ties(checkpoint, ties)
    return places


def located(leaves: Mapping[str, Any], names: Names) -> dict[str, Place]:
    """As `locate`, where all leaves have a name.

    Raises:
      ValueError: One has none.
    """
    places = locate(leaves, names)
    if lost := [path for path in leaves if path not in places]:
        raise ValueError(f"'{lost[0]}' gets no Hugging Face name, nor {len(lost) - 1} others: correct the names")
    return places


def stacked(place: Place) -> tuple[int, ...]:
    """The dimensions of a leaf each of whose entries is in a module of its own."""
    return tuple(place.axes.index(axis) for axis in place.stacked)


def twins(places: Mapping[str, Place]) -> dict[str, str]:
    """Their tensors that may be written though they are others, and those others: heads of tied embeddings."""
    tied = (place for place in places.values() if place.tied)
    return {f"{place.tied}.{place.role}": name for place in tied for name in place.tensors.values()}


def part_dimension(place: Place) -> int:
    """The dimension of their tensor along which a leaf is a part of it."""
    return place.groups.index(place.layout.side("o")[0])


def _fitting(params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None, shardings: Any) -> Any:
    """The leaves, their structure, and by path where they are in the checkpoint, and where they go."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}, which cannot hold weights: pass a floating one, or None for the file's")
    leaves, treedef = tree.flatten(params)
    places = located(leaves, names)
    where = _shardings(params, leaves, shardings)
    ties = _check(checkpoint, places, dtype)
    return leaves, treedef, places, where, ties


def _check(checkpoint: Checkpoint, places: Mapping[str, Place], dtype: DTypeLike | None) -> list[tuple[Tensor, Tensor]]:
    """Raises where the tensors do not fit the leaves; which of those left over are to be the same as others."""
    problems = []
    left_over = dict(checkpoint.tensors)
    for path, place in places.items():
        stored: dict[str, str] = {}
        for name in place.tensors.values():
            tensor = checkpoint.tensors.get(name)
            left_over.pop(name, None)
            if tensor is None:
                problems.append(f"missing: '{name}' {place.theirs} for {path}")
            elif tensor.shape != place.theirs:
                problems.append(f"misshapen: '{tensor.name}' {tensor.shape} for {path}, which needs {place.theirs}")
            elif tensor.stored not in DTYPES:
                problems.append(f"'{tensor.name}' is {tensor.stored}, {path} needs one of {', '.join(DTYPES)}")
            elif dtype is None and jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
                problems.append(
                    f"'{tensor.name}' is {tensor.stored}, of which JAX would lose half the bits: give dtype="
                )
            else:
                stored[tensor.stored] = tensor.name
        if dtype is None and len(stored) > 1:
            kinds = " and ".join(f"'{name}' {kind}" for kind, name in sorted(stored.items()))
            problems.append(f"{path} is stacked of {kinds}: give dtype=")
    ties = [
        (left_over.pop(name), checkpoint.tensors[other])
        for name, other in twins(places).items()
        if name in left_over and other in checkpoint.tensors
    ]
    problems += [f"left over: '{tensor.name}' {tensor.shape} {tensor.stored}" for tensor in left_over.values()]
    remedy = "load a config.json and weights that belong together"
    if left_over:
        remedy += ", or leave tensors out on purpose with ignore=[...], regexes that match their names in full"
    raise_if(problems, f"'{checkpoint.directory}' does not fit the model; {remedy}")
    return ties


def _check_ties(checkpoint: Checkpoint, ties: list[tuple[Tensor, Tensor]]) -> None:
    """Raises where what the model has once is there twice, and differs."""
    untied = [f"'{name.name}' is not '{other.name}'" for name, other in ties if not same_bits(name, other)]
    remedy = "if they were trained apart, set tie_word_embeddings to false in config.json, or ignore=[...] one"
    raise_if(untied, f"'{checkpoint.directory}' holds different weights for what the model has once; {remedy}")


def read_entry(tensor: Tensor, place: Place, dtype: np.dtype[Any]) -> np.ndarray:
    """A leaf's entry of a tensor, as we have it: read by rows, so that memory holds it once."""
    if not tensor.shape:
        return np.asarray(tensor, dtype)
    axes = [axis for axis in place.axes if axis not in place.stacked]
    ours = slices.empty([place.sizes[axis] for axis in axes], dtype)
    theirs = ours.transpose([axes.index(axis) for group in place.groups for axis in group])
    if not place.groups[0]:
        theirs = theirs[None]
    inner = theirs.shape[1 : max(1, len(place.groups[0]))]
    rows, start, window = math.prod(inner), 0, ()
    if place.part is not None:
        d = part_dimension(place)
        start, window = (place.part[0], ()) if d == 0 else (0, (*(slice(None),) * d, slice(*place.part[:2])))
    step = max(1, rows_of_block(tensor.shape, tensor.dtype) // rows)
    for i in range(0, len(theirs), step):
        block = theirs[i : i + step]
        found = tensor.rows(start + i * rows, start + (i + len(block)) * rows)
        block[...] = found[window].astype(dtype, copy=False).reshape(block.shape)  # a cast and a turn at once are slow
    return ours


def _shardings(params: Any, leaves: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    """Each leaf's sharding; None for the default device."""
    if shardings is None:
        return {path: on_mesh(leaf) for path, leaf in leaves.items()}
    if callable(shardings) and jax.tree_util.all_leaves([shardings]):
        shardings = shardings(params)
    if isinstance(shardings, jax.sharding.Sharding):
        found = dict.fromkeys(leaves, shardings)
    else:
        given = by_path(shardings)
        found = {path: given.get(path, given.get(path.removesuffix("/value"), "none")) for path in leaves}
    for path, sharding in found.items():
        if sharding is not None and not isinstance(sharding, jax.sharding.Sharding):
            what = "a PartitionSpec, of no mesh" if is_spec(sharding) else "no sharding"
            raise ValueError(
                f"shardings has {what} for '{path}': give a tree like params, as lora_jax.match_partition_rules(rules, "
                "params, mesh) returns it, or a function from params to one"
            )
        if isinstance(sharding, jax.sharding.NamedSharding):
            check_fits(path, leaves[path].shape, sharding.spec, sharding.mesh)
    return found

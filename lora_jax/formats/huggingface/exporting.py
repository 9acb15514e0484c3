"""Exporting: parameters become a directory as transformers' save_pretrained writes it, one tensor after the other."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax import tree
from lora_jax.formats import atomic
from lora_jax.formats.huggingface import slices
from lora_jax.formats.huggingface.checkpoint import Checkpoint
from lora_jax.formats.huggingface.directory import CONFIG, INDEX, WEIGHTS, others, raise_if, read_json
from lora_jax.formats.huggingface.filling import located, part_dimension, stacked, twins
from lora_jax.formats.huggingface.tensors import Lazy, cast
from lora_jax.formats.huggingface.tensors import write as write_file
from lora_jax.formats.layouts import arrange
from lora_jax.formats.names import Names, Place

HEADER = 4  # bytes of headers and index, about, for each of a tensor's name
LARGEST_SHARD = 5_000_000_000  # bytes, as transformers has it


def export(params: Any, names: Names) -> dict[str, Lazy]:
    """The inverse of `fill`: tensors by Hugging Face's names, as they have them, each made when it is asked for.

    Raises:
      ValueError: A path has no name, a leaf is spread over several processes, or parts of one tensor have two dtypes.

    >>> import jax.numpy as jnp
    >>> tensors = export({"up": {"kernel": jnp.ones((2, 3))}}, names=[("up", "layer.up", "linear")])
    >>> np.asarray(tensors["layer.up.weight"]).shape
    (3, 2)
    """
    leaves, _ = tree.flatten(params)
    parts: dict[str, list[tuple[Place, Any, tuple[int, ...]]]] = {}
    for path, place in located(leaves, names).items():
        if isinstance(leaves[path], jax.Array) and not leaves[path].is_fully_addressable:
            raise ValueError(f"'{path}' is spread over several processes: gather it in all, and save in one")
        for index, name in place.tensors.items():
            parts.setdefault(name, []).append((place, leaves[path], index))
    tensors = {}
    for name in sorted(parts, key=_natural):
        found = sorted(parts[name], key=lambda part: part[0].part or ())
        dtypes = {np.dtype(leaf.dtype) for _, leaf, _ in found}
        if len(dtypes) > 1:
            raise ValueError(f"'{name}' is made of leaves in {' and '.join(map(str, dtypes))}: cast them to one dtype")
        tensors[name] = Lazy(found[0][0].theirs, dtypes.pop(), functools.partial(_made, found))
    return tensors


def save(
    directory: str | Path, params: Any, names: Names, *, source: str | Path | Checkpoint | None = None, **options: Any
) -> Path:
    """Save a model's parameters, such as merged ones, as transformers' save_pretrained does.

    Args:
      directory: See `write`.
      params: The parameters.
      names: The model's list.
      source: See `write`. A head of tied embeddings is written if a `Checkpoint` has it.
      **options: See `write`.

    Returns:
      The directory.

    Raises:
      ValueError: See `export` and `write`.
      OSError: See `write`.

    >>> import tempfile, jax.numpy as jnp
    >>> names, params = [("up", "layer.up", "linear")], {"up": {"kernel": jnp.ones((2, 3))}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(file.name for file in save(f"{folder}/model", params, names, config={}).iterdir())
    ['config.json', 'model.safetensors']
    """
    tensors = export(params, names)
    if isinstance(source, Checkpoint):
        heads = twins(located(tree.flatten(params)[0], names)).items()
        tensors |= {name: tensors[other] for name, other in heads if name in source.tensors}
    return write(directory, tensors, source=source, **options)


def write(
    directory: str | Path,
    tensors: Mapping[str, Any],
    *,
    source: str | Path | Checkpoint | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | None = None,
) -> Path:
    """Write a model's directory, whole or not at all, the same bytes each time, with one tensor at a time in memory.

    Args:
      directory: It must not be there yet, or be empty; the one that it is in must exist.
      tensors: By Hugging Face's names, anything that has a shape, a dtype, and that `np.asarray` takes: arrays, what
        `export` returns, tensors of a `Checkpoint`, or a `Lazy` that is computed of one.
      source: The directory of the model that these weights were made of, whose config.json, generation_config.json and
        tokenizer are copied. As the opened `Checkpoint`, also what it has left out, its own spelling of names, and
        which tensor is in which file.
      config: The content of config.json; None for the source's. The dtype in it follows the tensors'.
      dtype: What floating tensors are cast to; None keeps theirs.
      max_shard_size: In bytes: more are split over several files, with an index; a larger tensor has a file to itself.
        None: as the `Checkpoint` has them, or 5 GB.

    Returns:
      The directory.

    Raises:
      ValueError: There is neither a source nor a config; or tensors are not those of the `Checkpoint` and there is no
        config for them; or a dtype has no form in a file.
      OSError: It cannot be written, or holds something; nothing is left behind.
    """
    folder = source.directory if isinstance(source, Checkpoint) else None if source is None else Path(source)
    if config is None and folder is None:
        raise ValueError(f"'{directory}' needs a config.json: give source=, a model's directory, or config=")
    if isinstance(source, Checkpoint):
        tensors = _as_in(source, tensors, check=config is None)
    copied = others(folder) if folder else []
    kept = _kept(source, tensors) if isinstance(source, Checkpoint) and max_shard_size is None else None
    shards = kept or _shards(tensors, dtype, LARGEST_SHARD if max_shard_size is None else max_shard_size)
    if config is None:
        config = source.config if isinstance(source, Checkpoint) else read_json(folder / CONFIG) if folder else {}
    described = dict(config)
    dtypes = {cast(x.dtype, dtype) for x in tensors.values() if jax.numpy.issubdtype(x.dtype, np.inexact)}
    field = "dtype" if "dtype" in described else "torch_dtype"
    if len(dtypes) == 1 and (dtype is not None or field in described):
        described[field] = str(*dtypes)
    sizes = [math.prod(x.shape) * cast(x.dtype, dtype).itemsize + HEADER * len(name) for name, x in tensors.items()]
    with atomic.directory(directory, sum(sizes) + sum(file.stat().st_size for file in copied)) as new:
        for name, shard in shards.items():
            write_file(new / name, shard, dtype)
        if [*shards] != [WEIGHTS]:
            size = sum(math.prod(x.shape) * cast(x.dtype, dtype).itemsize for x in tensors.values())
            files = {name: file for file, shard in shards.items() for name in shard}
            metadata = read_json(folder / INDEX).get("metadata") if kept and folder else None
            metadata = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
            _write_json(new / INDEX, {"metadata": metadata, "weight_map": files})
        _write_json(new / CONFIG, described)
        for file in copied:
            shutil.copyfile(file, new / file.name)
    return Path(directory)


def _made(parts: list[tuple[Place, Any, tuple[int, ...]]]) -> np.ndarray:
    """A tensor of theirs, of the leaves that are its parts."""
    made = []
    for place, leaf, index in parts:
        axes = [axis for axis in place.axes if axis not in place.stacked]
        made.append(arrange(slices.take(leaf, stacked(place), index), axes, place.groups))
    return made[0] if len(made) == 1 else np.concatenate(made, part_dimension(parts[0][0]))


def _as_in(source: Checkpoint, tensors: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Tensors by the names of a checkpoint's files, and all others that they hold."""
    if check:
        known, given = ({name: tuple(x.shape) for name, x in of.items()} for of in (source.tensors, tensors))
        wrong = [
            f"'{name}' {known.get(name, 'is not in it')}, given {given.get(name, 'none')}"
            for name in sorted({*known, *given})
            if known.get(name) != given.get(name)
        ]
        raise_if(wrong, f"these are not the tensors of '{source.directory}'; give config= for a model of their own")
    spelled = {source.tensors[name].name if name in source.tensors else name: x for name, x in tensors.items()}
    return spelled | {tensor.name: tensor for tensor in source.ignored}


def _kept(source: Checkpoint, tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Which tensors go to which file, as in a checkpoint; None where they are not its own."""
    files = {tensor.name: tensor.file.name for tensor in (*source.tensors.values(), *source.ignored)}
    if files.keys() != tensors.keys():
        return None
    shards: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        shards.setdefault(file, {})[name] = tensors[name]
    return shards


def _shards(tensors: Mapping[str, Any], dtype: DTypeLike | None, largest: int) -> dict[str, dict[str, Any]]:
    """Which tensors go to which file, in the order of their names."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name in sorted(tensors, key=_natural):
        own = math.prod(tensors[name].shape) * cast(tensors[name].dtype, dtype).itemsize
        if shards[-1] and size + own > largest:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += own
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", name)]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

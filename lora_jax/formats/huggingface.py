"""Hugging Face checkpoints: every tensor of the files goes into exactly one parameter, or nothing is loaded.

A model brings three short lists (see `lora_jax.models.bert`), and this file does the rest:

- names: (our module's path, their module's name, layout): a regex that must match in full, a template that it expands,
  and how such a module keeps its parameters;
- renames: (their spelling, the spelling that `names` uses), for prefixes and for older spellings;
- ignored: their tensors that carry nothing to learn, such as the constant `position_ids`.

PyTorch's linear layers keep (out, in), ours (in, out): the layout says which tensors to turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from lora_jax import tree

Names = Sequence[tuple[str, str, str]]
Turn = Callable[[np.ndarray], np.ndarray]

# Layout → our parameter → their name for it, and what turns the one array into the other; each is its own inverse.
LAYOUTS: dict[str, dict[str, tuple[str, Turn]]] = {
    "linear": {"kernel": ("weight", np.transpose), "bias": ("bias", np.asarray)},
    "norm": {"scale": ("weight", np.asarray), "bias": ("bias", np.asarray)},
    "embedding": {"embedding": ("weight", np.asarray)},
}
DTYPES = ("F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


class Tensor(NamedTuple):
    """Where a tensor lies, and what its file's header says of it; the values stay on disk."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(NamedTuple):
    """A directory's config.json, and its tensors by the names that the model's list uses."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def open_checkpoint(
    directory: str | Path,
    *,
    renames: Iterable[tuple[str, str]] = (),
    ignored: Iterable[str] = (),
    sha256: str | Mapping[str, str] | None = None,
) -> Checkpoint:
    """Read the config and the headers of a Hugging Face directory, and check that its files belong together.

    Args:
      directory: Holds config.json, and model.safetensors or else model.safetensors.index.json with its shards.
      renames: (regex, replacement) pairs, applied in order to each tensor's name where the regex matches in full.
      ignored: Regexes; a tensor whose name, in the file or renamed, matches one in full is left out.
      sha256: The hex digest of the weights file, or of each by its file name; compared before anything is parsed.

    Raises:
      FileNotFoundError: The directory, config.json, the weights or a shard is not there.
      CheckpointError: A file is unreadable or has another digest, index and shards disagree, or two names become one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"'{directory}' is no directory: pass the one that holds config.json and the weights")
    config = _read_json(directory / "config.json")
    files, listed = _weights(directory)
    if sha256 is not None:
        _check_digests(files, sha256)

    found = []
    for file in files:
        with _open(file) as values:
            for name in values.keys():
                header = values.get_slice(name)
                found.append(Tensor(file, name, tuple(header.get_shape()), header.get_dtype()))
    if listed is not None:
        held = {(tensor.name, tensor.file.name) for tensor in found}
        wrong = [f"'{name}' is not in '{file}', where the index lists it" for name, file in sorted(listed - held)]
        wrong += [f"'{name}' is in '{file}', where the index does not list it" for name, file in sorted(held - listed)]
        _raise_if(wrong, f"'{directory}': index and shards do not belong together; download all of them anew")

    tensors: dict[str, Tensor] = {}
    clashes, ignored = [], tuple(ignored)
    for tensor in found:
        name = tensor.name
        for pattern, replacement in renames:
            if match := re.fullmatch(pattern, name):
                name = match.expand(replacement)
        if not any(re.fullmatch(pattern, spelling) for pattern in ignored for spelling in (name, tensor.name)):
            if name in tensors:
                clashes.append(f"'{tensors[name].name}' and '{tensor.name}' both stand for '{name}'")
            tensors[name] = tensor
    _raise_if(clashes, f"'{directory}': two tensors for one parameter; take one of each pair out of the files")
    return Checkpoint(directory, config, tensors)


def fill(params: Any, checkpoint: Checkpoint, names: Names, dtype: DTypeLike | None = None) -> Any:
    """Fill the parameters from a checkpoint, tensor by tensor, with nothing left empty and nothing left over.

    Args:
      params: The parameters, or their shapes as `jax.eval_shape(model.init, ...)` gives them.
      checkpoint: What `open_checkpoint` returned.
      names: The model's list of (module path, module name, layout).
      dtype: What to cast every parameter to; None keeps each as it is stored.

    Returns:
      The tree of `params`, holding a `jax.Array` at each leaf.

    Raises:
      CheckpointError: Parameters are missing, or tensors are left over or misshapen; the one error lists them all.
      ValueError: dtype is not floating.

    >>> import jax, tempfile
    >>> from safetensors.numpy import save_file
    >>> directory = Path(tempfile.mkdtemp())
    >>> _ = (directory / "config.json").write_text("{}")
    >>> save_file({"up.weight": np.ones((3, 2), np.float32)}, directory / "model.safetensors")
    >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    >>> fill(shapes, open_checkpoint(directory), names=[("up", "up", "linear")])["up"]["kernel"].shape
    (2, 3)
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}, which cannot hold weights: pass a floating one, or None for the file's")
    leaves, treedef = tree.flatten(params)
    sources = tensor_names(leaves, names)
    left_over = dict(checkpoint.tensors)
    problems = []
    for path, (name, turn) in sources.items():
        shape = turn(np.broadcast_to(0, leaves[path].shape)).shape
        tensor = left_over.pop(name, None)
        if tensor is None:
            problems.append(f"missing: '{name}' {shape} for {path}")
        elif tensor.shape != shape:
            problems.append(f"misshapen: '{tensor.name}' {tensor.shape} for {path}, which needs {shape}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"'{tensor.name}' is {tensor.dtype}, {path} needs one of {', '.join(DTYPES)}")
    problems += [f"left over: '{tensor.name}' {tensor.shape} {tensor.dtype}" for tensor in left_over.values()]
    remedy = "load a config.json and weights that belong together"
    if left_over:
        remedy += ", or leave tensors out on purpose with ignore=[...], regexes that match their names in full"
    _raise_if(problems, f"'{checkpoint.directory}' does not fit the model; {remedy}")

    filled = dict.fromkeys(leaves)
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        with _open(file) as values:
            for path, (name, turn) in sources.items():
                if (tensor := checkpoint.tensors[name]).file == file:
                    filled[path] = jnp.asarray(turn(values.get_tensor(tensor.name)), dtype)
    return tree.unflatten(treedef, filled)


def export(params: Any, names: Names) -> dict[str, np.ndarray]:
    """The inverse of `fill`: arrays by Hugging Face name and in PyTorch's layout, for `safetensors.numpy.save_file`.

    >>> export({"up": {"kernel": jnp.ones((2, 3))}}, names=[("up", "layer.up", "linear")])["layer.up.weight"].shape
    (3, 2)
    """
    leaves, _ = tree.flatten(params)
    sources = tensor_names(leaves, names)
    return {name: np.ascontiguousarray(turn(np.asarray(leaves[path]))) for path, (name, turn) in sources.items()}


def tensor_names(paths: Iterable[str], names: Names) -> dict[str, tuple[str, Turn]]:
    """Each path's Hugging Face name, and what turns our array into theirs and back.

    Raises:
      ValueError: A path matches no entry of `names` or several, or two paths get one name.

    >>> sources = tensor_names(["layers_3/up/kernel"], [(r"layers_(\\d+)/up", r"layer.\\1.up", "linear")])
    >>> sources["layers_3/up/kernel"][0]
    'layer.3.up.weight'
    """
    sources: dict[str, tuple[str, Turn]] = {}
    for path in paths:
        module, _, leaf = path.rpartition("/")
        found = [
            (f"{match.expand(template)}.{LAYOUTS[layout][leaf][0]}", LAYOUTS[layout][leaf][1])
            for pattern, template, layout in names
            if leaf in LAYOUTS[layout] and (match := re.fullmatch(pattern, module))
        ]
        if len(found) != 1 or found[0] in sources.values():
            what = ", ".join(f"'{name}'" for name, _ in found) or "no Hugging Face name"
            raise ValueError(f"'{path}' gets {what}, not one name of its own: correct the model's list of names")
        sources[path] = found[0]
    return sources


def _weights(directory: Path) -> tuple[list[Path], set[tuple[str, str]] | None]:
    """The weights files, and the (tensor, file) pairs that the index lists; None where one file holds everything."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single], None
    if not index.is_file():
        remedy = "download one of them, or convert .bin files with transformers' save_pretrained"
        raise FileNotFoundError(f"'{directory}' has neither {single.name} nor {index.name}: {remedy}")
    listed = set(_read_json(index).get("weight_map", {}).items())
    files = [directory / name for name in sorted({name for _, name in listed})]
    absent = ", ".join(f"'{file.name}'" for file in files if not file.is_file())
    if absent or not files:
        raise FileNotFoundError(f"'{index}' lists {absent or 'no shards'}, not found beside it: download them")
    return files, listed


def _check_digests(files: list[Path], sha256: str | Mapping[str, str]) -> None:
    expected = {files[0].name: sha256} if isinstance(sha256, str) else sha256
    got = {}
    for file in files:
        with file.open("rb") as stream:
            got[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    pairs = {name: (expected.get(name, "none").lower(), got.get(name, "no such file")) for name in {*expected, *got}}
    wrong = [f"'{name}': expected {pair[0]}, got {pair[1]}" for name, pair in sorted(pairs.items()) if len({*pair}) > 1]
    _raise_if(wrong, f"'{files[0].parent}': other sha256 digests than expected; download anew, or correct the digests")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is missing: copy it from where the weights come from")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not JSON ({error}): download it anew") from error


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as values:
            yield values
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"'{file}' is no whole safetensors file ({error}): download it anew") from error


def _raise_if(problems: list[str], summary: str) -> None:
    if problems:
        raise CheckpointError("\n  ".join([f"{summary}:", *problems]))

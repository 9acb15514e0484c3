"""Tensors in safetensors files: read a few megabytes at a time, written one by one as they are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from lora_jax.formats.native import DTYPES

BLOCK = 2 << 20  # bytes: few enough that a transpose stays in the caches, enough that disks are read at their speed
LARGEST = 100 << 20  # bytes of a header, as safetensors has it, and of any other JSON
# safetensors writes wide dtypes first, so that all are aligned; in this order where they are equally wide.
ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2")
ORDER += ("I8", "U8", "BOOL")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, and what its file's header says of it; `np.asarray` reads it.

    Attributes:
      file: Its file.
      name: Its name in it.
      shape: Its shape.
      stored: Its dtype, as safetensors writes it: "F32", "BF16" ...
      start: The first of its bytes in the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    stored: str
    start: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's dtype.

        Raises:
          CheckpointError: NumPy and JAX have none.
        """
        if self.stored not in DTYPES:
            raise CheckpointError(f"'{self.name}' in '{self.file}' is {self.stored}; known are {', '.join(DTYPES)}")
        return jnp.dtype(DTYPES[self.stored])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Its entries from start to stop along its first dimension.

        Raises:
          CheckpointError: The file has not as many bytes any more, or cannot be read.
        """
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self._fill([(start * math.prod(self.shape[1:]), rows)])
        return rows

    def entries(self, positions: np.ndarray) -> np.ndarray:
        """Some of its entries, by their positions in C order; nothing else is read.

        Raises:
          CheckpointError: As `rows`.
        """
        found = np.empty(len(positions), self.dtype)
        self._fill([(int(position), found[i : i + 1]) for i, position in enumerate(positions)])
        return found

    def _fill(self, parts: Iterable[tuple[int, np.ndarray]]) -> None:
        """Reads arrays, each from the entry on that is named before it."""
        try:
            with open(self.file, "rb") as stream:
                for position, x in parts:
                    stream.seek(self.start + position * x.itemsize)
                    if stream.readinto(_bytes(x)) != x.nbytes:
                        raise CheckpointError(f"'{self.file}' has changed since it was opened: load it again")
        except OSError as error:
            raise CheckpointError(f"'{self.file}' cannot be read ({error.strerror}): copy it again") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self if self.shape else dataclasses.replace(self, shape=(1,))
        return np.asarray(whole.rows(0, whole.shape[0]).reshape(self.shape), dtype)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is asked for: `np.asarray` makes it, each time anew.

    >>> np.asarray(Lazy((2,), np.dtype("float32"), lambda: np.ones(2, np.float32)))
    array([1., 1.], dtype=float32)
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.ascontiguousarray(self.make(), dtype)  # as safetensors wants what it writes


def headers(file: Path) -> list[Tensor]:
    """The tensors of a safetensors file, in the order in which they lie.

    Raises:
      CheckpointError: It is no whole one.
    """
    try:
        with safetensors.safe_open(file, framework="numpy"):  # checks that all in it is where the header says
            pass
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = parsed(stream.read(size), file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"'{file}' is no whole safetensors file ({error}): download it anew") from error
    header.pop("__metadata__", None)
    found = [
        Tensor(file, name, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    ]
    return sorted(found, key=lambda tensor: tensor.start)


def parsed(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object of a file, in which no name occurs twice.

    Raises:
      CheckpointError: It is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{file}' is not JSON ({error}): download it anew") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{file}' holds {type(content).__name__}, and no JSON object: download it anew")
    return content


def write(file: Path, tensors: Mapping[str, Any], dtype: Any = None) -> None:
    """Writes a safetensors file, the bytes that safetensors itself writes, with one tensor at a time in memory.

    Args:
      file: It must not be there yet.
      tensors: By name, anything that has a shape, a dtype, and that `np.asarray` takes.
      dtype: What floating ones are cast to; None keeps theirs.

    Raises:
      ValueError: safetensors has no such dtype, or a tensor is made in another shape or dtype than it said.
      OSError: It cannot be written.
    """
    dtypes = {name: cast(x.dtype, dtype) for name, x in tensors.items()}
    spelled = {jnp.dtype(ours): theirs for theirs, ours in DTYPES.items()}
    if odd := [f"'{name}' is {found}" for name, found in dtypes.items() if found not in spelled]:
        raise ValueError(f"safetensors has no such dtype: {', '.join(odd[:5])}; cast with dtype=")
    names = sorted(tensors, key=lambda name: (ORDER.index(spelled[dtypes[name]]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name in names:
        start, stop = stop, stop + math.prod(tensors[name].shape) * dtypes[name].itemsize
        header[name] = {"dtype": spelled[dtypes[name]], "shape": [*tensors[name].shape], "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write(stream, name, tensors[name], dtypes[name])
        stream.flush()
        os.fsync(stream.fileno())


def cast(dtype: Any, to: Any) -> np.dtype[Any]:
    """The dtype of a tensor where floating ones are cast."""
    return jnp.dtype(to if to is not None and jnp.issubdtype(dtype, jnp.floating) else dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are of one shape and dtype, and hold the same bits."""
    if (left.shape, left.stored) != (right.shape, right.stored):
        return False
    length = left.shape[0]
    step = rows_of_block(left.shape, left.dtype)
    spans = ((i, min(i + step, length)) for i in range(0, length, step))
    return all(left.rows(*span).tobytes() == right.rows(*span).tobytes() for span in spans)


def rows_of_block(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """How many entries along the first dimension make a block."""
    return max(1, BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))


def digest(file: Path) -> str:
    """The hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(stream: Any, name: str, tensor: Any, dtype: np.dtype[Any]) -> None:
    """Writes a tensor's values by blocks, so that a transpose or a cast takes no memory to speak of."""
    x = tensor.make() if isinstance(tensor, Lazy) else np.asarray(tensor)
    if (x.shape, x.dtype) != (tuple(tensor.shape), tensor.dtype):
        raise ValueError(f"'{name}' was to be {tensor.shape} {tensor.dtype}, and is {x.shape} {x.dtype}")
    x = x if x.ndim else x[None]
    step = rows_of_block(x.shape, x.dtype)
    for i in range(0, len(x), step):
        with np.errstate(over="ignore"):  # it is an error below
            block = np.ascontiguousarray(x[i : i + step], dtype)
        if block.dtype != x.dtype and np.isinf(block).sum() > np.isinf(x[i : i + step]).sum():
            raise ValueError(f"'{name}' has values that {block.dtype} cannot hold: cast to float32 or bfloat16")
        stream.write(_bytes(block))


def _bytes(x: np.ndarray) -> memoryview:
    return x.reshape(-1).view(np.uint8).data

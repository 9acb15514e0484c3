"""Absent tensors: what a directory lacks and a model needs, such as a new task's head, with values known to all."""

from __future__ import annotations

import dataclasses

import numpy as np

from lora_jax.formats.huggingface.tensors import Tensor


@dataclasses.dataclass(frozen=True)
class Absent(Tensor):
    """A tensor that is in no file, and begins as zeros, or as the identity where it is `diagonal`.

    It stands for one among those of a `Checkpoint`; `file` is where it would be written.

    >>> from pathlib import Path
    >>> np.asarray(Absent(Path("model.safetensors"), "classifier.bias", (2,), "F32", 0))
    array([0., 0.], dtype=float32)
    >>> np.asarray(Absent(Path("model.safetensors"), "pooler.weight", (2, 2), "F32", 0, diagonal=True))
    array([[1., 0.],
           [0., 1.]], dtype=float32)
    """

    diagonal: bool = False

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Its entries from start to stop along its first dimension."""
        if self.diagonal:
            return np.eye(stop - start, self.shape[1], start, dtype=self.dtype)
        return np.zeros((stop - start, *self.shape[1:]), self.dtype)

    def entries(self, positions: np.ndarray) -> np.ndarray:
        """Some of its entries, by their positions in C order."""
        rows, columns = positions // self.shape[-1], positions % self.shape[-1]
        return (self.diagonal & (rows == columns)).astype(self.dtype)

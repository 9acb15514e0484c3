"""Axis: a named dimension, of a weight or of anything else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set

import numpy as np


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Axis:
    """A named axis, of a weight or of anything else; axes of the same name and size are the same axis.

    Attributes:
      name: Its name.
      size: Its length.
      roots: The dimensions of leaves that it comes from, as pairs of path and number; for messages.
    """

    name: str
    size: int
    roots: tuple[tuple[str, int], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.size, np.integer):  # as some of JAX's equations have it
            object.__setattr__(self, "size", int(self.size))

    def split(self, major: int) -> tuple[Axis, Axis]:
        """The axis as two, the first of size `major`.

        >>> Axis("1", 512).split(8)
        (Axis(name='1.0', size=8, roots=()), Axis(name='1.1', size=64, roots=()))
        """
        return Axis(f"{self.name}.0", major, self.roots), Axis(f"{self.name}.1", self.size // major, self.roots)


Axes = tuple[Axis, ...]


def size_of(axes: Sequence[Axis] | Set[Axis]) -> int:
    """How many entries an array over these axes has."""
    return math.prod(axis.size for axis in axes)


def roots_of(*groups: Iterable[Axis]) -> tuple[tuple[str, int], ...]:
    """Where an axis comes from that stands for all of these: of each leaf, from what the first group has of it."""
    roots: dict[tuple[str, int], None] = {}
    for group in groups:
        paths = {path for path, _ in roots}
        roots.update({root: None for axis in group for root in axis.roots if root[0] not in paths})
    return tuple(roots)


def fresh(taken: frozenset[str]) -> Iterator[str]:
    """Names for axes that are none of those taken."""
    return (name for i in itertools.count() if (name := f"a{i}") not in taken)


def weight_axes(shape: Sequence[int]) -> Axes:
    """The axes of a leaf of this shape, each named by its number.

    >>> weight_axes((512, 64))
    (Axis(name='0', size=512, roots=()), Axis(name='1', size=64, roots=()))
    """
    return tuple(Axis(str(d), size) for d, size in enumerate(shape))

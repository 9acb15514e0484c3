"""Layouts: how the axes of an array of ours lie in the dimensions of a tensor of theirs.

One is "linear", "conv1d" (transformers' linear layer of this name), "conv", "embedding", "vector", "experts" and
"transposed_experts" (bare parameters; the latter of modules that say `is_transposed`), "parameter" (a tensor by its
own name, of any shape); or one of these with axes, as in einops: "linear: in heads width -> (heads width) in".
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Groups = tuple[tuple[str, ...], ...]

# Each kind's axes where a layout gives none, what their dimensions are (batch, in, out; of a window all that follow),
# and the kind of its sites.
KINDS = {
    "linear": ("in out -> out in", "oi", "linear"),
    "conv1d": ("in out -> in out", "io", "linear"),
    "conv": ("height width in out -> out in height width", "oi", "conv"),
    "embedding": ("in out -> in out", "io", "embedding"),
    "experts": ("expert in out -> expert out in", "boi", "linear"),
    "transposed_experts": ("expert in out -> expert in out", "bio", "linear"),
    "vector": ("out -> out", "o", "other"),
    "parameter": ("", "", "other"),  # with as many axes as the leaf has
}
BARE = ("experts", "transposed_experts")


class Layout(NamedTuple):
    """How a weight of theirs is made of ours.

    Attributes:
      kind: One of `KINDS`.
      ours: Our axes by name.
      theirs: Their dimensions, each the product of some of our axes.
    """

    kind: str
    ours: tuple[str, ...]
    theirs: Groups

    def side(self, which: str) -> Groups:
        """Their dimensions that are batch "b", in "i", out "o" or a window's "w", of which which may name several."""
        marks = KINDS[self.kind][1].ljust(len(self.theirs), "w")
        return tuple(group for group, mark in zip(self.theirs, marks, strict=True) if mark in which)


def arrange(x: Any, axes: Sequence[str], groups: Groups) -> Any:
    """An array with named axes in the dimensions that groups of them make; an empty group is one of size 1.

    >>> import numpy as np
    >>> arrange(np.zeros((4, 2, 3)), ["in", "heads", "width"], (("heads", "width"), ("in",))).shape
    (6, 4)
    """
    sizes = dict(zip(axes, x.shape, strict=True))
    order = [axes.index(axis) for group in groups for axis in group]
    return x.transpose(order).reshape([math.prod(sizes[axis] for axis in group) for group in groups])


def restore(x: Any, groups: Groups, axes: Sequence[str], sizes: Mapping[str, int]) -> Any:
    """The inverse of `arrange`.

    >>> import numpy as np
    >>> restore(
    ...     np.zeros((6, 4)), (("heads", "width"), ("in",)), ["in", "heads", "width"], {"in": 4, "heads": 2, "width": 3}
    ... ).shape
    (4, 2, 3)
    """
    flat = [axis for group in groups for axis in group]
    return x.reshape([sizes[axis] for axis in flat]).transpose([flat.index(axis) for axis in axes])


@functools.cache
def parse(layout: str) -> Layout:
    """A layout as its parts.

    Raises:
      ValueError: Its kind is not known, or its two sides do not have the same axes.

    >>> parse("linear: in heads width -> (heads width) in").theirs
    (('heads', 'width'), ('in',))
    """
    kind, _, axes = layout.partition(":")
    if kind not in KINDS:
        raise ValueError(f"the layout '{layout}' is of no known kind: use one of {', '.join(KINDS)}")
    if layout == "parameter":
        return Layout(kind, (), ())
    left, _, right = (axes or KINDS[kind][0]).partition("->")
    groups = tuple(tuple((group or single).split()) for group, single in re.findall(r"\(([^)]*)\)|(\w+)", right))
    ours, theirs = tuple(left.split()), [axis for group in groups for axis in group]
    if not theirs or len({*ours}) < len(ours) or len({*theirs}) < len(theirs) or not {*theirs} <= {*ours}:
        raise ValueError(f"the layout '{layout}': each axis of theirs is one of ours, as in 'linear: in out -> out in'")
    if len(groups) < len(KINDS[kind][1]) or (kind != "conv" and len(groups) > len(KINDS[kind][1])):
        raise ValueError(f"the layout '{layout}': theirs has dimensions as in '{kind}: {KINDS[kind][0]}'")
    return Layout(kind, ours, groups)

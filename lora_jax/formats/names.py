"""Names: where each leaf of a model is in Hugging Face's modules, and how its axes lie there.

A model brings a tuple of (pattern, template, layout), for weights and adapters alike; one matches each leaf's module:

- pattern: a regex that matches the path of our module in full: a leaf's path without its last part, where that is one
  of `ROLES`, such as `kernel`; else all of it, but for `_bias` at its end;
- template: their module, `\\1` from the pattern and `{layer}` from its group of this name, with dots for slashes. Where
  no such group matched, `layer` is a leading axis of ours, and each of its entries a module of theirs: so one entry
  serves a model whether its layers are stacked or not. `{part:k_proj,v_proj}` is an axis whose entries have these
  names. `qkv_proj[1]`: ours are the outputs of theirs from where those of `[0]` end. `embed_tokens=lm_head`: an
  embedding of ours that is also their linear layer lm_head, where no leaf of ours is that by itself;
- layout: how its axes lie in their tensor, such as "linear" (see `lora_jax.formats.layouts`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.formats.layouts import BARE, KINDS, Groups, Layout, parse
from lora_jax.sites import Site

Names = Sequence[tuple[str, str, str]]

BLANK = r"\{(\w+)(?::([^}]*))?\}"  # of a template
# The last part of a leaf's path, in Flax, Haiku, Equinox or Tunix, and Hugging Face's name for it.
WEIGHT, BIAS = "weight", "bias"
ROLES: dict[str, str] = dict.fromkeys(("kernel", "embedding", "scale", "weight", "w", "input_embedding"), WEIGHT)
ROLES |= dict.fromkeys(("bias", "b"), BIAS)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is in their modules.

    Attributes:
      shape: The leaf's shape.
      axes: A name for each of its dimensions.
      role: "weight" or "bias".
      layout: That of the module's weight.
      modules: Their module for each index along `stacked`; under `()` alone where the leaf is in one.
      part: Of the module's outputs, (the first, the one after the last, their number); None where the leaf has all.
      tied: Another module of theirs that the leaf is, turned; None where there is none, or where another leaf is that.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: str
    layout: Layout
    modules: Mapping[tuple[int, ...], str]
    part: tuple[int, int, int] | None = None
    tied: str | None = None

    @property
    def groups(self) -> Groups:
        """The dimensions of their tensor."""
        return self.layout.theirs if self.role == WEIGHT else self.layout.side("bo")

    @property
    def stacked(self) -> tuple[str, ...]:
        """The axes each of whose entries is in a module of its own."""
        inside = {axis for group in self.groups for axis in group}
        return tuple(axis for axis in self.axes if axis not in inside)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(zip(self.axes, self.shape, strict=True))

    @property
    def tensors(self) -> dict[tuple[int, ...], str]:
        """The name of their tensor for each index along `stacked`; experts and their biases are no module's."""
        bare = self.layout.kind in (*BARE, "parameter")
        suffix = ("" if self.role == WEIGHT else f"_{self.role}") if bare else f".{self.role}"
        return {index: module + suffix for index, module in self.modules.items()}

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        sizes = self.sizes
        shape = [math.prod(sizes[axis] for axis in group) for group in self.groups]
        if self.part is not None:
            shape[self.groups.index(self.layout.side("o")[0])] = self.part[2]
        return tuple(shape)

    def site(self) -> Site:
        """The leaf's site, as tracing a model finds it that uses the leaf as theirs does."""
        if self.role == BIAS or self.layout.kind in ("vector", "parameter"):
            return Site(self.shape, "other")
        dims = {which: self._dims(self.layout.side(which)) for which in ("i", "o", "w", "iw")}
        batch = tuple(d for d in range(len(self.shape)) if d not in (*dims["iw"], *dims["o"]))
        kind = KINDS[self.layout.kind][2]
        return Site(self.shape, kind, batch, dims["iw"], dims["o"], window_axes=dims["w"])

    def _dims(self, groups: Groups) -> tuple[int, ...]:
        return tuple(sorted(self.axes.index(axis) for group in groups for axis in group))


def locate(leaves: Mapping[str, Any], names: Names) -> dict[str, Place]:
    """Where each leaf is that has a name; the others are left out.

    Args:
      leaves: Arrays or their shapes, by path: all of a model's, since parts of a tensor are told apart by their order.
      names: The model's list.

    Raises:
      ValueError: A path matches several entries, an entry does not fit the leaf's shape, or two leaves get one tensor.

    >>> import numpy as np
    >>> names = [(r".*layers(?:_(?P<layer>\\d+))?/(up|down)", r"layers.{layer}.\\2_proj", "linear")]
    >>> locate({"layers_3/up/kernel": np.ones((4, 8))}, names)["layers_3/up/kernel"].tensors
    {(): 'layers.3.up_proj.weight'}
    >>> locate({"layers/up/bias": np.ones((2, 8))}, names)["layers/up/bias"].tensors
    {(0,): 'layers.0.up_proj.bias', (1,): 'layers.1.up_proj.bias'}
    """
    places, owners = {}, {}
    parts: dict[str, dict[int, str]] = {}
    for path, leaf in leaves.items():
        found = _place(path, tuple(leaf.shape), names)
        if found is None:
            continue
        places[path], number = found
        for tensor in places[path].tensors.values():
            known = parts.setdefault(tensor, {})
            other = owners.setdefault(tensor, path) if number is None or number in known else path
            if other != path or (number is None and known) or number in known:
                raise ValueError(
                    f"'{path}' and '{known.get(number or 0, other)}' are both '{tensor}': correct the names"
                )
            if number is not None:
                known[number] = path
    for known in parts.values():
        start, whole = 0, sum(_outputs(places[path]) for path in known.values())
        for number in sorted(known):
            place = places[known[number]]
            stop = start + _outputs(place)
            places[known[number]] = dataclasses.replace(place, part=(start, stop, whole))
            start = stop
    known = {module for place in places.values() for module in place.modules.values()}
    return {path: dataclasses.replace(p, tied=None) if p.tied in known else p for path, p in places.items()}


def module_of(path: str) -> tuple[str, str]:
    """The module that patterns are matched with, and the role of a leaf.

    >>> module_of("mlp/up/kernel"), module_of("experts/up_bias")
    (('mlp/up', 'weight'), ('experts/up', 'bias'))
    """
    path = path.removesuffix("/value")  # nnx.State has Variables as nodes of its tree
    module, _, last = path.rpartition("/")
    if last in ROLES:
        return module, ROLES[last]
    return path.removesuffix("_bias"), BIAS if last.endswith("_bias") else WEIGHT


def _place(path: str, shape: tuple[int, ...], names: Names) -> tuple[Place, int | None] | None:
    """The place of a leaf, but for how large the parts before it are, and which part it is."""
    module, role = module_of(path)
    matches = [(match, *entry[1:]) for entry in names if (match := re.fullmatch(entry[0], module))]
    if not matches:
        return None
    if len(matches) > 1:
        patterns = " and ".join(f"'{match.re.pattern}'" for match, *_ in matches)
        raise ValueError(f"'{path}' matches {patterns}: correct the names, so that one entry matches each module")
    ((match, template, layout),) = matches
    layout = parse(layout)
    given = {name: value.replace("/", ".") for name, value in match.groupdict().items() if value is not None}
    template, _, tied = match.expand(template).partition("=")
    template, _, part = template.rstrip("]").partition("[")
    blanks = {name: choices.split(",") if choices else None for name, choices in re.findall(BLANK, template)}
    pending = {name: choices for name, choices in blanks.items() if name not in given}
    if layout.kind == "parameter":
        role = WEIGHT
        own = tuple(f"axis_{i}" for i in range(len(shape) - len(pending)))
        layout = Layout(layout.kind, own, tuple((axis,) for axis in own))
    inside = {axis for group in (layout.theirs if role == WEIGHT else layout.side("bo")) for axis in group}
    own = [axis for axis in layout.ours if axis in inside or axis in pending]
    axes = (*(name for name in pending if name not in own), *own)
    sizes = dict(zip(axes, shape, strict=False))
    wrong = [name for name, choices in pending.items() if choices and len(choices) != sizes.get(name)]
    if len(axes) != len(shape) or wrong:
        raise ValueError(f"'{path}' has shape {shape}, and its layout axes {' '.join(axes)}: correct the names")
    stacked = [axis for axis in axes if axis in pending]
    modules = {}
    for index in itertools.product(*(range(sizes[axis]) for axis in stacked)):
        words = dict(given)
        for axis, i in zip(stacked, index, strict=True):
            choices = pending[axis]
            words[axis] = choices[i] if choices else str(i)
        modules[index] = re.sub(BLANK, lambda blank, words=words: words[blank[1]], template)
    return Place(shape, axes, role, layout, modules, tied=tied or None), int(part) if part else None


def _outputs(place: Place) -> int:
    """How many outputs of their module a leaf makes."""
    return math.prod(place.sizes[axis] for group in place.layout.side("o") for axis in group)

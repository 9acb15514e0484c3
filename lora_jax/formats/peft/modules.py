"""Modules: a leaf's factors as those of each module that it is in, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.factors import Adapter
from lora_jax.formats.layouts import arrange, restore
from lora_jax.formats.names import Place
from lora_jax.formats.peft.factors import Form, axes, forms, merged
from lora_jax.sites import Site
from lora_jax.variants import LoKr, VeRA
from lora_jax.variants.base import Variant


@dataclasses.dataclass(frozen=True)
class Module:
    """One module's adapter in PEFT's form.

    Attributes:
      variant: What it has.
      place: Where the leaf is.
      forms: PEFT's tensor for each factor.
      factors: The tensors by our factor's name, with dimensions that are products in the file apart.
    """

    variant: Variant
    place: Place
    forms: Mapping[str, Form]
    factors: Mapping[str, np.ndarray]

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The tensors as in the file, for a module of this name."""
        found = {}
        for factor, x in self.factors.items():
            form = self.forms[factor]
            found[f"{name}.{form.suffix}"] = x.reshape(merged(x.shape, form))
        return found


def cut(adapter: Adapter, place: Place, tied: bool = False) -> dict[str, Module]:
    """A leaf's adapter as those of its modules, by name.

    Args:
      adapter: The adapter.
      place: Where the leaf is.
      tied: Whether for the module that it is tied to, and not its own.

    Raises:
      ValueError: PEFT has no such variant there, or the leaf was adapted along other axes than its layout has.
    """
    variant, site = adapter.variant, adapter.site
    check_sides(site, place)
    if isinstance(variant, VeRA | LoKr) and {*site.out_axes} & {place.axes.index(axis) for axis in place.stacked}:
        raise ValueError(f"{type(variant).__name__} of several modules at once is none of each: `merge` it")
    named, own = forms(variant, site, place, tied), axes(variant, site, place)
    found = {}
    for index, name in place.modules.items():
        at = dict(zip(place.stacked, index, strict=True))
        factors = {}
        for factor, form in named.items():
            x = np.asarray(adapter.factors[factor])[tuple(at.get(axis, slice(None)) for axis in own[factor])]
            factors[factor] = arrange(x, [axis for axis in own[factor] if axis not in at], form.groups)
        found[place.tied if tied else name] = Module(variant, place, named, factors)
    return found


def check_sides(site: Site, place: Place) -> None:
    """Raises where a leaf's in and out axes are not those of its layout; what is stacked may be either or neither."""
    expected, stacked = place.site(), {place.axes.index(axis) for axis in place.stacked}
    sides = [{*site.in_axes}, {*site.out_axes} - stacked, {*site.batch_axes} - stacked]
    if sides != [{*expected.in_axes}, {*expected.out_axes} - stacked, {*expected.batch_axes} - stacked]:
        raise ValueError(
            f"it is adapted with in axes {site.in_axes} and out axes {site.out_axes}, and the layout has {place.axes} "
            f"with in axes {expected.in_axes} and out axes {expected.out_axes}: correct the names, or the rule's axes"
        )


def joined(parts: Mapping[tuple[int, ...], Mapping[str, np.ndarray]], variant: Variant, place: Place) -> Adapter:
    """The inverse of `cut`: a leaf's adapter, from the factors of its modules as `Module` has them.

    Args:
      parts: Factors for each index along what is stacked.
      variant: That of all modules.
      place: Where the leaf is.
    """
    site = _site(parts, place)
    named, own = forms(variant, site, place), axes(variant, site, place)
    factors = {}
    for factor, form in named.items():
        inside = [axis for axis in own[factor] if axis not in place.stacked]
        found = [restore(part[factor], form.groups, inside, own[factor]) for part in parts.values()]
        x = np.stack(found).reshape(*(place.sizes[axis] for axis in place.stacked), *found[0].shape)
        # Of what several modules share there is one.
        x = x[tuple(slice(None) if axis in own[factor] else 0 for axis in place.stacked)]
        order = [axis for axis in place.stacked if axis in own[factor]] + inside
        factors[factor] = x.transpose([order.index(axis) for axis in own[factor]])
    return Adapter(factors, variant, site)


def _site(parts: Mapping[tuple[int, ...], Mapping[str, np.ndarray]], place: Place) -> Site:
    """The leaf's site: modules that are parts of one, and have one A, are outputs; else they are a batch."""
    site = place.site()
    for axis in place.stacked:
        where, dim = place.stacked.index(axis), place.axes.index(axis)
        if "A" not in next(iter(parts.values())) or _numbered(place, where):
            continue
        first = {index: part["A"] for index, part in parts.items() if index[where] == 0}
        same = (np.array_equal(part["A"], first[(*i[:where], 0, *i[where + 1 :])]) for i, part in parts.items())
        if place.sizes[axis] > 1 and all(same):
            batch = tuple(d for d in site.batch_axes if d != dim)
            site = dataclasses.replace(site, batch_axes=batch, out_axes=tuple(sorted((*site.out_axes, dim))))
    return site


def _numbered(place: Place, where: int) -> bool:
    """Whether modules along a stacked axis are told apart by numbers, as layers and experts are, and parts are not."""
    index = next(iter(place.modules))
    other = tuple(int(i == where) for i in range(len(index)))
    if other not in place.modules:
        return True
    names = (place.modules[i].split(".") for i in (index, other))
    return all(a == b or a.isdigit() for a, b in zip(*names, strict=False))


def shape_of(form: Form, own: Mapping[str, int], place: Place) -> tuple[int, ...]:
    """The shape of a tensor with products apart; where the leaf is a part of its module, that of the whole module."""
    sizes: list[Any] = []
    for word, group in zip(form.words, form.groups, strict=True):
        size = int(np.prod([own[axis] for axis in group], dtype=int))
        sizes.append(place.part[2] if word == "out" and place.part is not None else size)
    return tuple(sizes)

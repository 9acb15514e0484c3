"""Full: leaves that train as they are, which are modules_to_save, or biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.layouts import arrange, restore
from lora_jax.formats.names import BIAS, Place
from lora_jax.formats.peft import describe
from lora_jax.variants import Full

BASE_BIAS = ".base_layer.bias"
UNTIE = "load a model whose head is a leaf of its own, as with tie_word_embeddings=False"


class Saved(NamedTuple):
    """What a file has of leaves that train as they are.

    Attributes:
      tensors: By name.
      modules: Those that PEFT replaces as a whole.
      bias: What its config says of biases.
    """

    tensors: dict[str, np.ndarray]
    modules: set[str]
    bias: str


def written(
    lora_params: Mapping[str, Adapter],
    places: Mapping[str, Place],
    leaves: Mapping[str, Any],
    adapted: Collection[str],
    peft_type: str,
) -> Saved:
    """The tensors of those leaves that train as they are.

    A bias of an adapted module, or one whose weight does not train, is a bias; else weight and bias are saved together.

    Args:
      lora_params: All adapters.
      places: Where the leaves are.
      leaves: The base's arrays, for what of a module does not train; or nothing.
      adapted: The modules that have an adapter.
      peft_type: That of the adapters.

    Raises:
      ValueError: It takes a base to complete a module, or PEFT's type has no biases.
    """
    fulls = {path: adapter for path, adapter in lora_params.items() if isinstance(adapter.variant, Full)}
    owners = owned(places)
    trained = {name for name, paths in owners.items() if {*paths} & {*fulls}}
    whole = {name.rpartition(".")[0] for name in trained if not _is_bias(places[owners[name][0]])}
    if both := sorted(whole & {*adapted}):
        raise ValueError(f"'{both[0]}' is trained as it is in one part and adapted in another: adapt its parts alike")
    tensors, bias = {}, "none"
    for name in sorted(trained):
        module = name.rpartition(".")[0]
        if module in whole:
            continue
        if peft_type not in describe.BIAS:
            raise ValueError(f"PEFT's {peft_type} has no biases, and '{name}' trains: leave it out, or `merge`")
        bias = "all" if bias == "all" or module not in adapted else describe.BIAS[peft_type]
        tensors[f"{module}{BASE_BIAS}" if module in adapted else name] = tensor(name, owners, places, fulls, leaves)
    for name in sorted(owners):
        if name.rpartition(".")[0] in whole:
            tensors[name] = tensor(name, owners, places, fulls, leaves)
    return Saved(tensors, whole, bias)


def owned(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """The leaves that each of their tensors is made of."""
    owners: dict[str, list[str]] = {}
    for path, place in places.items():
        for name in _names(place):
            owners.setdefault(name, []).append(path)
    return owners


def _names(place: Place) -> list[str]:
    return [*place.tensors.values(), *([f"{place.tied}.{place.role}"] if place.tied else [])]


def _is_bias(place: Place) -> bool:
    return place.role == BIAS


def tensor(
    name: str,
    owners: Mapping[str, list[str]],
    places: Mapping[str, Place],
    fulls: Mapping[str, Adapter],
    leaves: Mapping[str, Any],
) -> np.ndarray:
    """A tensor of theirs, from the leaves that it is made of."""
    found = {}
    for path in owners[name]:
        place = places[path]
        leaf = fulls[path].factors["weight"] if path in fulls else leaves.get(path)
        if leaf is None or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"'{path}' does not train, and PEFT saves all of its module: give base=, the weights that have it"
            )
        index = next((index for index, own in place.tensors.items() if own == name), ())
        at = dict(zip(place.stacked, index, strict=True))
        x = np.asarray(leaf)[tuple(at.get(axis, slice(None)) for axis in place.axes)]
        x = arrange(x, [axis for axis in place.axes if axis not in at], place.groups)
        found[place.part or ()] = x, place
    parts = [x for _, x in sorted(found.items(), key=lambda item: item[0])]
    x, place = parts[0]
    if place.part is None:
        return x
    if sum(stop - start for start, stop, _ in found) != place.part[2]:
        raise ValueError(f"'{name}' trains in part, and the rest of it is not known: give base=, the model's weights")
    return np.concatenate([x for x, _ in parts], axis=place.groups.index(place.layout.side("o")[0]))


def taken(tensors: dict[str, np.ndarray], places: Mapping[str, Place], leaves: Mapping[str, Any]) -> LoraParams:
    """The adapters of leaves whose tensors are in a file as they are; those tensors are taken out of the dict.

    Raises:
      ValueError: Only some of a leaf's layers have a tensor, or it is not of the leaf's shape.
    """
    found, used = LoraParams(), set()
    for path, place in places.items():
        names = {index: _present(name, tensors) for index, name in place.tensors.items()}
        have = [name for name in names.values() if name is not None]
        if not have:
            if place.tied and f"{place.tied}.{place.role}" in tensors:
                raise ValueError(f"'{place.tied}' is trained, which is '{path}' too, and that is not: {UNTIE}")
            continue
        if len(have) < len(names):
            missing = next(place.tensors[index] for index, name in names.items() if name is None)
            raise ValueError(
                f"'{path}' holds all layers, and of '{missing}' there is none: load the model with layers that are not "
                "stacked"
            )
        axes = [axis for axis in place.axes if axis not in place.stacked]
        parts = []
        for name in have:
            x = tensors[name]
            if x.shape != place.theirs:
                raise ValueError(
                    f"'{name}' has shape {x.shape}, and '{path}' makes it {place.theirs}: not of this model"
                )
            if place.part is not None:
                dim = place.groups.index(place.layout.side("o")[0])
                x = x.take(range(*place.part[:2]), axis=dim)
            parts.append(restore(x, place.groups, axes, place.sizes))
        if place.tied:
            (name,), other = have, f"{place.tied}.{place.role}"
            if other not in tensors or tensors[other].tobytes() != tensors[name].tobytes():
                why = "differ" if other in tensors else "are not both in the file"
                raise ValueError(f"'{other}' and '{name}' {why}, and both are '{path}': {UNTIE}")
            used.add(other)
        used.update(have)
        stack = [place.sizes[axis] for axis in place.stacked]
        order = [*place.stacked, *axes]
        x = np.stack(parts).reshape(*stack, *parts[0].shape).transpose([order.index(axis) for axis in place.axes])
        dtype = None if x.dtype == leaves[path].dtype else x.dtype.name
        found[path] = Adapter({"weight": jnp.asarray(x)}, Full(dtype), place.site())
    for name in used:
        del tensors[name]
    return found


def _present(name: str, tensors: Mapping[str, Any]) -> str | None:
    """The name that a leaf's tensor has in a file, if it is there: a bias may be that of an adapted module."""
    module, _, last = name.rpartition(".")
    return next((n for n in (name, *([module + BASE_BIAS] if last == BIAS else [])) if n in tensors), None)

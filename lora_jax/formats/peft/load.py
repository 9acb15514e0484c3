"""Load: PEFT's folder as adapters."""

from __future__ import annotations

import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.description import shown
from lora_jax.formats.names import WEIGHT, Groups, Names, Place, locate, restore
from lora_jax.formats.peft.config import variant_of
from lora_jax.formats.peft.factors import axes, forms
from lora_jax.formats.peft.read import read
from lora_jax.formats.peft.selection import resolved
from lora_jax.variants.base import RANK, Variant


def load(directory: str | os.PathLike[str], params: Any, names: Names) -> LoraParams:
    """Reads a folder that PEFT, or `save`, wrote.

    Args:
      directory: The folder.
      params: The model's parameters, or their shapes.
      names: The model's name map.

    Returns:
      `lora_params`, by path.

    Raises:
      ValueError: A tensor has no place in the model, or a module lacks one.
    """
    config, tensors = read(directory)
    places = locate(tree.flatten(params)[0], names)
    try:
        return _loaded(config, tensors, places)
    except ValueError as error:
        raise ValueError(f"'{directory}': {error}") from error


def _loaded(config: dict[str, Any], tensors: dict[str, np.ndarray], places: dict[str, Place]) -> LoraParams:
    weights = [place for place in places.values() if place.role == WEIGHT]
    kinds = {module: place.layout.kind for place in weights for module in place.modules.values()}
    config, lora_params = resolved(config, tensors, kinds), LoraParams()
    for path, place in places.items():
        if not place.site().adaptable:
            continue
        variants = {variant_of(module, config) for module in place.modules.values() if _adapted(module, tensors)}
        if not variants:
            continue
        if len(variants) > 1:
            raise ValueError(
                f"it gives the layers of '{path}' different variants, {variants}, which are one array here"
            )
        (variant,) = variants
        lora_params[path] = _adapter(variant, place, tensors)
    if tensors:
        raise ValueError(f"tensors that have no place in the model: {', '.join(map(shown, sorted(tensors)[:5]))}")
    return lora_params


def _adapted(module: str, tensors: dict[str, np.ndarray]) -> bool:
    return any(name.startswith(f"{module}.lora_") for name in tensors)


def _adapter(variant: Variant, place: Place, tensors: dict[str, np.ndarray]) -> Adapter:
    """The adapter of a leaf, whose tensors are taken out of the dict."""
    factors, own = {}, axes(variant, place)
    for factor, form in forms(variant, place).items():
        inside = [axis for axis in own[factor] if axis not in place.stacked]
        sizes = {**place.sizes, RANK: variant.rank}
        parts = []
        for module in place.modules.values():
            parts.append(
                restore(_taken(tensors, f"{module}.{form.suffix}", form.groups, sizes), form.groups, inside, sizes)
            )
        stack = [place.sizes[axis] for axis in place.stacked]
        factors[factor] = jnp.asarray(np.stack(parts).reshape(*stack, *parts[0].shape) if stack else parts[0])
    return Adapter(factors, variant, place.site())


def _taken(tensors: dict[str, np.ndarray], name: str, groups: Groups, sizes: dict[str, int]) -> np.ndarray:
    """A tensor, out of the dict, whose shape is what the model and the configuration say."""
    if name not in tensors:
        raise ValueError(f"it lacks {shown(name)}: save the adapter again")
    x, shape = tensors.pop(name), tuple(math.prod(sizes[axis] for axis in group) for group in groups)
    if x.shape != shape:
        raise ValueError(
            f"{shown(name)} has shape {x.shape}, and should have {shape}, by this model and rank {sizes[RANK]} of the "
            "configuration: load the model that it was made for, or correct the rank"
        )
    return x

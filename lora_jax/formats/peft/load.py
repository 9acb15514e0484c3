"""Load: PEFT's folder as adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.names import Names, Place, locate, restore
from lora_jax.formats.peft.config import variant_of
from lora_jax.formats.peft.factors import axes, forms
from lora_jax.formats.peft.save import CONFIG, PREFIX, WEIGHTS
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
    directory = Path(directory)
    config = json.loads((directory / CONFIG).read_text())
    tensors = {key.removeprefix(PREFIX): x for key, x in load_file(directory / WEIGHTS).items()}
    places, lora_params = locate(tree.flatten(params)[0], names), LoraParams()
    for path, place in places.items():
        if not place.site().adaptable:
            continue
        variants = {variant_of(module, config) for module in place.modules.values() if _adapted(module, tensors)}
        if not variants:
            continue
        (variant,) = variants
        lora_params[path] = _adapter(variant, place, tensors)
    if tensors:
        raise ValueError(f"{directory}: tensors that have no place in the model: {', '.join(sorted(tensors)[:5])}")
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
            x = tensors.pop(f"{module}.{form.suffix}")
            parts.append(restore(x, form.groups, inside, sizes))
        stack = [place.sizes[axis] for axis in place.stacked]
        factors[factor] = jnp.asarray(np.stack(parts).reshape(*stack, *parts[0].shape) if stack else parts[0])
    return Adapter(factors, variant, place.site())

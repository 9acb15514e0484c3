"""Save: adapters as PEFT's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as serialize

from lora_jax import tree
from lora_jax.factors import Adapter
from lora_jax.formats import atomic
from lora_jax.formats.names import Names, arrange, locate
from lora_jax.formats.peft.config import describe
from lora_jax.formats.peft.factors import axes, forms
from lora_jax.formats.peft.read import CONFIG, PREFIX, WEIGHTS, sealed


def save(
    directory: str | os.PathLike[str], lora_params: Mapping[str, Adapter], names: Names, *, base: Any = None
) -> Path:
    """Writes adapters as a folder that PEFT loads.

    Args:
      directory: The folder; made if it is not there.
      lora_params: What trains, as `split` returned it.
      names: The model's name map.
      base: The model's parameters, or their shapes.

    Returns:
      The folder.
    """
    sites = {path: adapter.site for path, adapter in lora_params.items()}
    leaves = sites if base is None else tree.flatten(base)[0]
    places = locate(leaves, names)
    tensors, variants = {}, {}
    for path, adapter in lora_params.items():
        place = places[path]
        named, own = forms(adapter.variant, place), axes(adapter.variant, place)
        for index, module in place.modules.items():
            variants[module] = adapter.variant
            at = dict(zip(place.stacked, index, strict=True))
            for factor, form in named.items():
                x = np.asarray(adapter.factors[factor])[tuple(at.get(axis, slice(None)) for axis in own[factor])]
                inside = [axis for axis in own[factor] if axis not in at]
                tensors[f"{PREFIX}{module}.{form.suffix}"] = np.ascontiguousarray(arrange(x, inside, form.groups))
    known = (
        {} if base is None else {module for p in places.values() for module in p.modules.values() if p.site().adaptable}
    )
    config = describe(variants, known)
    directory = Path(directory)
    directory.mkdir(exist_ok=True)
    atomic.write(directory / WEIGHTS, sealed(serialize(tensors, {"format": "pt"}), config))
    atomic.write(directory / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return directory

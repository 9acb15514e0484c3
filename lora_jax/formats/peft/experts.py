"""Experts: parameters that are no module's weight, whose adapters PEFT names after the module that holds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.formats.layouts import BARE
from lora_jax.formats.names import Names, Place, module_of

BASE = ".base_layer"  # what a second adapter of one module wraps


def nested(adapted: Collection[str], places: Mapping[str, Place], names: Names) -> dict[str, str]:
    """The name that PEFT has for each of these parameters' adapters.

    It wraps a module once for each of its parameters, in the order in which the module has them, here that of the name
    map: so the last is the module's own, and the one before is within, at `base_layer`.

    Args:
      adapted: The parameters, by name.
      places: Where the leaves are.
      names: The name map.

    >>> from lora_jax.formats.names import locate
    >>> import numpy as np
    >>> names = [("(up|down)", r"mlp.experts.\\1_proj", "experts")]
    >>> places = locate({"up/kernel": np.ones((4, 8, 16))}, names)
    >>> nested(["mlp.experts.up_proj"], places, names)
    {'mlp.experts.up_proj': 'mlp.experts'}
    """
    order: dict[str, list[tuple[int, str]]] = {}
    for path, place in places.items():
        if place.layout.kind not in BARE:
            continue
        entry = next(i for i, (pattern, *_) in enumerate(names) if re.fullmatch(pattern, module_of(path)[0]))
        for name in {*place.modules.values()} & {*adapted}:
            order.setdefault(name.rpartition(".")[0], []).append((entry, name))
    found = {}
    for module, own in order.items():
        unique = [name for _, name in sorted({name: (entry, name) for entry, name in sorted(own)}.values())]
        found |= {name: module + BASE * depth for depth, name in enumerate(reversed(unique))}
    return found


def unnested(
    tensors: Mapping[str, Any], adapted: Collection[str], places: Mapping[str, Place], names: Names
) -> dict[str, Any]:
    """Tensors by name with those of parameters named after these; the inverse of what `nested` says."""
    theirs = {name: ours for ours, name in nested(adapted, places, names).items()}
    found = {}
    for name, x in tensors.items():
        module, dot, rest = name.partition(".lora_")
        found[f"{theirs.get(module, module)}{dot}{rest}"] = x
    return found

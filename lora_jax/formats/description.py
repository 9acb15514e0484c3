"""Adapters' variants and axes in JSON's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.native import _describe, _described
from lora_jax.variants.base import SHARED


def describe(lora_params: Mapping[str, Adapter]) -> dict[str, Any]:
    """Variant, its fields and the site of each adapter."""
    return {path: _describe(adapter) for path, adapter in lora_params.items()}


def restored(described: Mapping[str, Any], arrays: Mapping[str, Any]) -> LoraParams:
    """The adapters of a description, with factors by `path:factor`."""
    adapters = LoraParams()
    for path, entry in described.items():
        variant, site = _described(entry)
        names = variant.shared if site.kind == SHARED else variant.names(site)
        adapters[path] = Adapter({name: arrays[f"{path}:{name}"] for name in names}, variant, site)
    return adapters

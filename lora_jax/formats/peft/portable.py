"""Portable: LoRA in the form that every server reads, one rank and one scale, and nothing to look up by module."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.formats.peft.describe import number
from lora_jax.formats.peft.fused import scaled
from lora_jax.formats.peft.modules import Module
from lora_jax.variants import LoRA, LoRAFA


def portable(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Modules of the largest rank, filled up with zeros, and of the commonest scale, with others' in B.

    Servers such as SGLang know one alpha and one rank for all, and divide them without regard to rsLoRA.

    Raises:
      ValueError: They have no form for a variant.
    """
    for name, module in modules.items():
        if type(module.variant) not in (LoRA, LoRAFA):
            raise ValueError(
                f"'{name}' has {type(module.variant).__name__}, and servers read LoRA alone: `merge` it and serve the "
                "weights, or make it a LoRA with `extract`, or leave portable out, for PEFT itself"
            )
    variants: list[Any] = [module.variant for module in modules.values()]
    rank = max(variant.rank for variant in variants)
    scale, _ = collections.Counter(variant.scale for variant in variants).most_common(1)[0]
    variant = LoRA(rank, number(scale * rank))
    return {name: _as(module, variant) for name, module in modules.items()}


def _as(module: Module, variant: LoRA) -> Module:
    own: Any = module.variant
    factors = {}
    for factor, x in module.factors.items():
        at = module.forms[factor].words.index("rank")
        missing = [(0, (variant.rank - n) * (dim == at)) for dim, n in enumerate(x.shape)]
        factors[factor] = np.pad(x, missing)
    factors["B"] = scaled(factors["B"], own.scale / variant.scale)
    return dataclasses.replace(module, variant=variant, factors=factors)

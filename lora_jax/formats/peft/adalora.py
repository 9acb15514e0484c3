"""AdaLoRA in PEFT's form: one rank and one scale for all modules, and files without the ranks that were pruned."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.formats.peft.factors import Form
from lora_jax.formats.peft.fused import scaled
from lora_jax.formats.peft.modules import Module
from lora_jax.variants import AdaLoRA

Kept = Mapping[str, Sequence[bool]]


def alike(modules: Mapping[str, Module]) -> tuple[dict[str, Module], dict[str, list[bool]] | None]:
    """Modules of one rank and scale, without the ranks that are zero, and which each has left, if one has not all.

    PEFT prunes E's entries, and with them the rows of A and columns of B, which are zero here.
    """
    variants: list[Any] = [module.variant for module in modules.values()]
    rank = max(variant.rank for variant in variants)
    scale, _ = collections.Counter(variant.scale for variant in variants).most_common(1)[0]
    variant = AdaLoRA(rank, scale * rank)
    left: dict[str, list[bool]] = {}
    found = {}
    for name, module in modules.items():
        own: Any = module.variant
        factors = {**module.factors, "E": scaled(module.factors["E"], own.scale / scale)}
        used = np.zeros(rank, bool)
        for factor, x in factors.items():
            at = module.forms[factor].words.index("rank")
            used[: own.rank] |= (x != 0).any(tuple(dim for dim in range(x.ndim) if dim != at))
        left[f"{name}.lora_E"] = used.tolist()
        kept = np.flatnonzero(used)
        factors = {f: x.take(kept, axis=module.forms[f].words.index("rank")) for f, x in factors.items()}
        found[name] = dataclasses.replace(module, variant=variant, factors=factors)
    return found, None if all(map(all, left.values())) else left


def filled(x: np.ndarray, form: Form, kept: Sequence[bool] | None, rank: int) -> np.ndarray:
    """A factor with zeros for the ranks that a file lacks."""
    if kept is None:
        return x
    at = form.words.index("rank")
    whole = np.zeros((*x.shape[:at], rank, *x.shape[at + 1 :]), x.dtype)
    whole[(slice(None),) * at + (np.flatnonzero(kept),)] = x
    return whole

"""Config: adapter_config.json, and which variant it gives each module."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.variants import DoRA, LoRA


def describe(variants: Mapping[str, LoRA], known: Collection[str]) -> dict[str, Any]:
    """The config that gives each of these modules its variant.

    Args:
      variants: By module.
      known: All modules of the model that could be targets, as far as they are known.
    """
    stabilized = {variant.scaling == "rank_stabilized" for variant in variants.values()}
    kinds = {type(variant) for variant in variants.values()}
    if len(stabilized) > 1 or len(kinds) > 1:
        raise ValueError("PEFT's config says once for all modules whether they are DoRA's, or rank-stabilized")
    ranks = {module: variant.rank for module, variant in variants.items()}
    alphas = {module: _number(variant.alpha or variant.rank) for module, variant in variants.items()}
    (rank, rank_pattern), (alpha, alpha_pattern) = _patterns(ranks), _patterns(alphas)
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": targets(variants, known),
        "use_rslora": stabilized == {True},
        "use_dora": kinds == {DoRA},
        "fan_in_fan_out": False,
        "bias": "none",
        "lora_dropout": max(variant.dropout for variant in variants.values()),
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
        "base_model_name_or_path": None,
        "task_type": None,
    }


def variant_of(module: str, config: Mapping[str, Any]) -> LoRA:
    """The variant of a module, by a configuration as `selection.resolved` returns it."""
    rank = config["rank_pattern"].get(module, config["r"])
    alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
    scaling = "rank_stabilized" if config.get("use_rslora") else "standard"
    return (DoRA if config.get("use_dora") else LoRA)(rank, alpha, scaling, dropout=config.get("lora_dropout", 0.0))


def targets(adapted: Iterable[str], known: Collection[str]) -> list[str]:
    """The shortest names that PEFT finds these modules by, and no other that is known: ends, or names in full."""
    adapted, found = {*adapted}, set()
    for module in adapted:
        parts = module.split(".")
        ends = (".".join(parts[-i:]) for i in range(1, len(parts)))
        fitting = (end for end in ends if known and all(m in adapted for m in known if f".{m}".endswith(f".{end}")))
        found.add(next(fitting, module))
    return sorted(found)


def _patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for each module that has another: the whole name, so that no two overlap."""
    ((common, _),) = collections.Counter(values.values()).most_common(1)
    return common, {f"^{re.escape(module)}": value for module, value in values.items() if value != common}


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value

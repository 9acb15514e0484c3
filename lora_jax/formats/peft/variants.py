"""Variants: what a config says that each module has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.formats.peft.describe import EPSILON, snapped
from lora_jax.variants import IA3, AdaLoRA, DoRA, LoHa, LoKr, LoRA, VeRA
from lora_jax.variants.base import Variant

KINDS: Mapping[str, type[Variant]] = {
    "LORA": LoRA,
    "ADALORA": AdaLoRA,
    "VERA": VeRA,
    "IA3": IA3,
    "LOHA": LoHa,
    "LOKR": LoKr,
}


def variant_of(module: str, config: Mapping[str, Any], dtype: str) -> Variant:
    """The variant of an adapted module.

    An alpha equal to the rank is None, as it is for a variant that was made without one.

    Args:
      module: Its name; a bare parameter's own.
      config: As `selection.resolved` returns it.
      dtype: That of its tensors.

    >>> config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"h.0.q": 2}, "alpha_pattern": {}}
    >>> variant_of("h.0.q", config, "float32")
    LoRA(rank=2, alpha=8.0, scaling='standard', init='normal', dtype='float32', dropout=0.0)
    """
    kind = config["peft_type"]
    if kind == "IA3":
        return IA3("in" if module in config["feedforward_modules"] else "out", dtype)
    if kind == "VERA":
        return VeRA(config["r"], dtype=dtype, dropout=config.get("vera_dropout", 0.0))
    if kind == "ADALORA":
        rank = config["init_r"]
        alpha = snapped(config["lora_alpha"] * rank / (rank + EPSILON))
        return AdaLoRA(rank, _alpha(alpha, rank), dtype=dtype, dropout=config.get("lora_dropout", 0.0))
    rank = config["rank_pattern"].get(module, config["r"])
    alpha = config["lora_alpha"] if kind == "LORA" else config["alpha"]
    alpha = _alpha(config["alpha_pattern"].get(module, alpha), rank)
    if kind == "LOHA":
        return LoHa(rank, alpha, dtype=dtype)
    if kind == "LOKR":
        factor, both = config.get("decompose_factor", -1), config.get("decompose_both", False)
        return LoKr(rank, alpha, factor, both, dtype=dtype)
    scaling = "rank_stabilized" if config.get("use_rslora") else "standard"
    dropout = config.get("lora_dropout", 0.0)
    return (DoRA if config.get("use_dora") else LoRA)(rank, alpha, scaling, dtype=dtype, dropout=dropout)


def _alpha(alpha: float, rank: int) -> float | None:
    return None if alpha == rank else alpha

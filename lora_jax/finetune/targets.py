"""Targets: presets and patterns as rules, of any model here."""

from __future__ import annotations

from typing import Any

from lora_jax.sites import Site
from lora_jax.variants import Variant

PRESETS = ("all-linear", "attention")


def rules(targets: str, variant: Variant) -> Any:
    """Rules for `lora_jax.split`.

    Args:
      targets: "all-linear", all linear layers but the head; "attention", those of attention; or a regex of whole paths.
      variant: What they get.
    """
    if targets not in PRESETS:
        return {targets: variant}

    def rule(path: str, site: Site) -> Variant | None:
        inside = "/attention/" in path if targets == "attention" else "/head/" not in path
        return variant if site.kind == "linear" and inside else None

    return rule

"""Targets: presets and patterns as rules, of any model here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_jax.sites import Site
from lora_jax.variants import Full, Variant

PRESETS = ("all-linear", "attention", "all")
HEADS = re.compile(r".*/(head|pooler|classifier)/.*")  # what makes predictions, and is no layer


def rules(
    targets: str,
    variant: Variant,
    sites: Mapping[str, Site],
    *,
    whole: tuple[str, ...] = (),
) -> dict[str, Variant]:
    """Rules for `lora_jax.split`.

    Args:
      targets: "all-linear", all linear layers but heads and poolers; "attention", those of attention; "all", every
        leaf that the function reads; or a regex of whole paths.
      variant: What they get.
      sites: What `lora_jax.sites` found.
      whole: Regexes of leaves that train whole, whatever the targets say, as a classifier's head.

    Raises:
      ValueError: The preset matches nothing; or it is "all" of a variant that does not suit all leaves.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> params = {"layer": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    >>> params = {"params": params}
    >>> def fun(params, x):
    ...     return x @ params["params"]["layer"]["kernel"] @ params["params"]["head"]["kernel"]
    >>> rules("all-linear", lora.LoRA(rank=1), lora.sites(fun, params, jnp.ones(2))).keys()
    dict_keys(['params/layer/kernel'])
    """
    first: dict[str, Variant] = {pattern: Full("float32") for pattern in whole}
    if targets not in PRESETS:
        return {**first, targets: variant}
    if targets == "all" and not isinstance(variant, Full):
        name = type(variant).__name__
        raise ValueError(f"--targets all: norms and biases have no {name}: take --variant Full, or all-linear")
    try:
        taken = [re.compile(pattern) for pattern in whole]
    except re.error as error:
        raise ValueError(f"--trains {error.pattern}: it is no regular expression ({error}): correct it") from None
    paths = [
        path
        for path, site in sites.items()
        if _in(targets, path, site) and not any(pattern.fullmatch(path) for pattern in taken)
    ]
    if not paths:
        raise ValueError(f"--targets {targets}: the model has none: give a regex of paths (lora-jax sites shows them)")
    return {**first, **{re.escape(path): variant for path in paths}}


def _in(targets: str, path: str, site: Site) -> bool:
    if targets == "all":
        return site.kind != "unused"
    inside = "/attention/" in path if targets == "attention" else not HEADS.fullmatch(path)
    return site.kind == "linear" and inside

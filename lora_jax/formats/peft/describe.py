"""Describe: the adapter_config.json that gives each module its variant, and the variant that one gives it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lora_jax.formats.layouts import BARE
from lora_jax.formats.peft.factors import TYPES
from lora_jax.formats.peft.modules import Module
from lora_jax.formats.peft.targeting import feedforward, patterns, targets
from lora_jax.variants import IA3, AdaLoRA, DoRA, LoHa, LoKr, LoRA, VeRA
from lora_jax.variants.base import Variant

NONE = "dummy-target-modules"  # PEFT's word for an adapter that has modules_to_save alone
EPSILON = 1e-5  # which AdaLoRA adds to the rank
BIAS = {"LORA": "lora_only", "ADALORA": "lora_only", "VERA": "vera_only"}  # bias= of those types that have it


KINDS: Mapping[str, type[Variant]] = {
    "LORA": LoRA,
    "ADALORA": AdaLoRA,
    "VERA": VeRA,
    "IA3": IA3,
    "LOHA": LoHa,
    "LOKR": LoKr,
}


def describe(modules: Mapping[str, Module], known: Collection[str]) -> dict[str, Any]:
    """The fields that depend on the modules.

    Args:
      modules: The adapted modules by name; bare parameters by theirs.
      known: All modules of the model that could be targets, and what contains them; empty where that is not known.

    Raises:
      ValueError: PEFT's config cannot say it: it has one variant, and one LoRA's form, for all modules.
    """
    types = {TYPES[type(module.variant)][0] for module in modules.values()}
    if len(types) > 1:
        found = ", ".join(sorted({type(module.variant).__name__ for module in modules.values()}))
        raise ValueError(f"a folder of PEFT's holds adapters of one kind, and these are {found}: save each by itself")
    bare = {name for name, module in modules.items() if module.place.layout.kind in BARE}
    kinds = {module.place.layout.kind for module in modules.values()}
    (name,) = types or {"LORA"}
    parameters = targets(bare, known)
    if isinstance(parameters, str):
        raise ValueError(f"PEFT takes {sorted(bare)[0]} for the end of another parameter's name: `merge` instead")
    return {
        "peft_type": name,
        "target_modules": targets({*modules} - bare, known) if {*modules} - bare else [] if bare else NONE,
        "inference_mode": True,
        **_DESCRIBED[name]({name: module.variant for name, module in modules.items()}, bool(bare), known),
        **({"target_parameters": parameters} if bare else {}),
        **({"fan_in_fan_out": "conv1d" in kinds} if name not in ("LOHA", "LOKR") else {}),
    }


def _lora(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    dora = {isinstance(variant, DoRA) for variant in variants.values()}
    if len(dora) > 1:
        raise ValueError("PEFT's config says once for all modules whether they are DoRA's: save each kind by itself")
    stabilized = {variant.scaling == "rank_stabilized" for variant in variants.values()}

    def alpha(variant: Any) -> float:
        """Of modules of both scalings, each has its scale as a standard one."""
        return (variant.alpha or variant.rank) if len(stabilized) == 1 else variant.scale * variant.rank

    ranks, alphas = _ranks(variants), _same({name: number(alpha(variant)) for name, variant in variants.items()})
    return {
        "r": ranks[0],
        "lora_alpha": alphas[0],
        "rank_pattern": ranks[1],
        "alpha_pattern": alphas[1],
        "use_rslora": stabilized == {True},
        "use_dora": dora == {True},
        # PEFT has one for all, and none with parameters.
        "lora_dropout": 0.0 if bare else max((variant.dropout for variant in variants.values()), default=0.0),
        "init_lora_weights": True,
    }


def _adalora(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    ((rank, scale),) = {(variant.rank, variant.scale) for variant in variants.values()}
    return {
        "init_r": rank,
        "target_r": rank,
        "lora_alpha": number(snapped(scale * (rank + EPSILON))),
        "lora_dropout": max(variant.dropout for variant in variants.values()),
        "total_step": 1,
        "rank_pattern": None,
    }


def _vera(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    dropout = max(variant.dropout for variant in variants.values())
    return {"r": _one(variants, "rank"), "save_projection": True, "projection_prng_key": 0, "vera_dropout": dropout}


def _ia3(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    inputs = {name for name, variant in variants.items() if isinstance(variant, IA3) and variant.side == "in"}
    names = [targets(own, known) for own in (inputs, {*variants} - inputs) if own]
    both = exact = targets(variants, known)
    if all(isinstance(own, list) for own in names):
        both = sorted({name for own in names for name in own})
    elif isinstance(exact, list):
        both = exact
    return {"target_modules": both, "feedforward_modules": feedforward(inputs, {*variants} - inputs, both)}


def _hadamard(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    ranks = _ranks(variants)
    alphas = _same({name: number(variant.alpha or variant.rank) for name, variant in variants.items()})
    return {"r": ranks[0], "rank_pattern": ranks[1], "alpha": alphas[0], "alpha_pattern": alphas[1]}


def _kronecker(variants: Mapping[str, Any], bare: bool, known: Collection[str]) -> dict[str, Any]:
    both = {"decompose_both": _one(variants, "decompose_both"), "decompose_factor": _one(variants, "factor")}
    return {**_hadamard(variants, bare, known), **both}


_DESCRIBED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "VERA": _vera,
    "IA3": _ia3,
    "LOHA": _hadamard,
    "LOKR": _kronecker,
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


def number(value: float) -> float:
    """A whole number as an int, as PEFT's fields have it."""
    return int(value) if float(value).is_integer() else value


def snapped(value: float) -> float:
    """A number without the rounding of its last digits, so that a factor and its inverse give the number back."""
    return float(f"{value:.12g}")


def _ranks(variants: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _same({name: variant.rank for name, variant in variants.items()})


def _same(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    return patterns(values) if values else (8, {})


def _one(variants: Mapping[str, Any], field: str) -> Any:
    found = {getattr(variant, field) for variant in variants.values()}
    if len(found) > 1:
        kind = type(next(iter(variants.values()))).__name__
        raise ValueError(f"PEFT's {kind} has one {field} for all modules, and these have {sorted(found)}: make it one")
    return found.pop()


def _alpha(alpha: float, rank: int) -> float | None:
    return None if alpha == rank else alpha

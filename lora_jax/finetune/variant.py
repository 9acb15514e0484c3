"""Variant: the one that settings name, with its fields, and the learning rate that suits it."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_jax import tree
from lora_jax.finetune.settings import Settings
from lora_jax.initial.names import FROM_DATA, NAMED, named
from lora_jax.variants import Variant

RANKS = {"VeRA": 256}  # as PEFT's default; others have 8, as PEFT's and TRL's do
RANK = 8
# Peaks for AdamW. LoRA: QLoRA (https://arxiv.org/abs/2305.14314) and TRL; Full: TRL; IA3: Liu et al. 2022
# (https://arxiv.org/abs/2205.05638); VeRA: Kopiczko et al. 2023 (https://arxiv.org/abs/2310.11454). LoHa, LoKr and
# AdaLoRA: LoRA's, times how much higher the rates were that experiments/variants chose for them.
RATE = 2e-4
RATES = {"Full": 2e-5, "IA3": 3e-3, "VeRA": 4e-3, "LoHa": 6e-4, "LoKr": 6e-4, "AdaLoRA": 6e-4}
# Those that begin as a part of the weight learn faster: Meng et al. 2024 (https://arxiv.org/abs/2404.02948).
BEGUN_RATE = 2e-5


def variant_of(settings: Settings) -> Variant:
    """The variant; with an initialization from data it has none yet (see `lora_jax.finetune.beginning`).

    Raises:
      ValueError: There is no such variant, it has no such field, or the field may not hold that.

    >>> variant_of(Settings(variant="DoRA", rank=4, set={"scaling": "rank_stabilized"}))
    DoRA(rank=4, alpha=None, scaling='rank_stabilized', init='normal', dtype='float32', dropout=0.0)
    >>> variant_of(Settings(variant="IA3", rank=4))
    Traceback (most recent call last):
    ValueError: --rank: IA3 has no field 'rank': its fields are side, dtype
    """
    registry = {name: kind for name, kind in Variant.registry.items() if kind.__module__.startswith("lora_jax.")}
    kind = Variant.registry.get(settings.variant)
    if kind is None:
        close = tree.close_to(settings.variant, registry)
        raise ValueError(f"--variant {settings.variant}: the variants are {', '.join(registry)}{close}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    own = {name: getattr(settings, name) for name in ("rank", "alpha", "dropout", "init")}
    own = {name: (f"--{name}", x) for name, x in own.items() if x is not None}
    for name, word in settings.set.items():
        if name in own:
            raise ValueError(f"--set {name}={word}: --{name} says it already: take one of them out")
        own[name] = (f"--set {name}={word}", _literal(word))
    for name, (where, _) in own.items():
        if name not in fields:
            raise ValueError(f"{where}: {settings.variant} has no field {name!r}: its fields are {', '.join(fields)}")
    if from_data(settings):
        own.pop("init")
    given: dict[str, Any] = {"rank": RANKS.get(settings.variant, RANK)} if "rank" in fields else {}
    if settings.variant == "Full":
        given["dtype"] = "float32"  # AdamW's steps are lost in bfloat16
    given |= {name: x for name, (_, x) in own.items()}
    if isinstance(given.get("init"), str):
        _check_init(given["init"])
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"--variant {settings.variant}: {error}") from error


def from_data(settings: Settings) -> str | None:
    """The name of the initialization from data that is asked for, if one is.

    Raises:
      ValueError: It is LoftQ's, or not of a LoRA.
    """
    if settings.init not in FROM_DATA:
        return None
    if settings.init == "loftq":
        raise ValueError("--init loftq: it is for a quantized base, and train has none: take pissa, or leave it out")
    if settings.variant not in ("LoRA", "DoRA", "LoRAFA"):
        raise ValueError(f"--init {settings.init}: it is for LoRA, not {settings.variant}: take --variant LoRA")
    return settings.init


def learning_rate(settings: Settings) -> float:
    """The peak of the learning rate: what was given, or what suits the variant.

    >>> learning_rate(Settings()), learning_rate(Settings(init="pissa")), learning_rate(Settings(variant="Full"))
    (0.0002, 2e-05, 2e-05)
    """
    if settings.learning_rate is not None:
        return settings.learning_rate
    begun = settings.init or ""
    if begun.startswith("pissa") or begun in ("olora", "corda", "lora_ga"):
        return BEGUN_RATE
    return RATES.get(settings.variant, RATE)


def _check_init(name: str) -> None:
    if named(name) is None:
        from lora_jax.variants.initializers import INITIALIZERS

        if name not in INITIALIZERS:
            known = (*INITIALIZERS, *NAMED, *(known for known in FROM_DATA if known != "loftq"))
            raise ValueError(f"--init {name}: known are {', '.join(known)}{tree.close_to(name, known)}")


def _literal(word: str) -> Any:
    """A word as the number, truth value or None that it is written as.

    >>> [_literal(word) for word in ("4", "1e-3", "true", "none", "in")]
    [4, 0.001, True, None, 'in']
    """
    if word.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(word.lower())
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word

"""Fused: one module of theirs, such as qkv_proj, whose outputs are made by several leaves of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.formats.names import Place
from lora_jax.formats.peft.factors import Form
from lora_jax.formats.peft.modules import Module
from lora_jax.variants import DoRA, LoRA, LoRAFA


def fuse(name: str, parts: Sequence[Module]) -> Module:
    """One module's adapter from those of its parts: B block by block, and the ranks added up, or A once if all have it.

    Args:
      name: The module, for messages.
      parts: Of those of its parts that are adapted.

    Raises:
      ValueError: The parts' variants have no common form.
    """
    parts = sorted(parts, key=_start)
    types = {type(part.variant) for part in parts}
    if not types <= {LoRA, LoRAFA, DoRA} or (DoRA in types and not (len(types) == 1 and _whole(parts))):
        found = ", ".join(sorted(kind.__name__ for kind in types))
        raise ValueError(
            f"'{name}' is made of several leaves, adapted with {found}: PEFT's module holds LoRA of any of them, or "
            "DoRA of all: adapt them alike, or `merge`"
        )
    first, whole = parts[0], _part(parts[0])[2]
    variants = [_lora(part.variant) for part in parts]
    a, b = first.forms["A"], first.forms["B"]
    rank_a, rank_b, out = a.words.index("rank"), b.words.index("rank"), b.words.index("out")
    alike = len({(v.rank, v.scale) for v in variants}) == 1
    shared = alike and all(same_bits(part.factors["A"], first.factors["A"]) for part in parts)
    rank = variants[0].rank if shared else sum(v.rank for v in variants)
    shape = [size for size in first.factors["B"].shape]
    shape[out], shape[rank_b] = whole, rank
    factors, at = {"B": np.zeros(shape, first.factors["B"].dtype)}, 0
    for part, variant in zip(parts, variants, strict=True):
        start, stop, _ = _part(part)
        where: list[Any] = [slice(None)] * len(shape)
        where[out], where[rank_b] = slice(start, stop), slice(None) if shared else slice(at, at + variant.rank)
        factors["B"][tuple(where)] = scaled(part.factors["B"], variant.scale / variants[0].scale)
        at += variant.rank
    factors["A"] = first.factors["A"] if shared else np.concatenate([part.factors["A"] for part in parts], axis=rank_a)
    if "magnitude" in first.factors:
        axis = first.forms["magnitude"].words.index("out")
        factors["magnitude"] = np.concatenate([part.factors["magnitude"] for part in parts], axis=axis)
    return dataclasses.replace(first, variant=with_rank(variants[0], rank), factors=factors)


def parted(
    variant: Any, forms: Mapping[str, Form], factors: Mapping[str, np.ndarray], place: Place, others: Sequence[Place]
) -> tuple[Any, dict[str, np.ndarray]] | None:
    """The inverse of `fuse`: a part's variant and factors, from those of its module; None where it is not adapted.

    Where each column of B makes outputs of one part alone, that part has it, and its row of A; else all have all of A.

    Args:
      variant: The module's.
      forms: PEFT's tensors, of the part.
      factors: The module's.
      place: The part's place.
      others: The places of all parts, this one's among them.
    """
    assert place.part is not None
    start, stop, _ = place.part
    found = {}
    for factor, x in factors.items():
        words = forms[factor].words
        where = tuple(slice(start, stop) if word == "out" else slice(None) for word in words)
        found[factor] = x[where]
    a, b = forms["A"].words.index("rank"), forms["B"].words.index("rank")
    out = forms["B"].words.index("out")
    column = tuple(i for i in range(factors["B"].ndim) if i not in (b, out))
    used = np.any(factors["B"] != 0, axis=column) if column else factors["B"] != 0
    used = used if out < b else used.T
    blocks = {other.part: used[other.part[0] : other.part[1]].any(0) for other in others if other.part is not None}
    if isinstance(variant, DoRA) or not (np.sum([*blocks.values()], axis=0) == 1).all():
        return variant, found
    own = np.flatnonzero(blocks[place.part])
    if not len(own):
        return None
    found["A"], found["B"] = found["A"].take(own, axis=a), found["B"].take(own, axis=b)
    return with_rank(variant, len(own)), found


def with_rank(variant: LoRA, rank: int) -> LoRA:
    """The variant with another rank and the same scale."""
    ratio = rank / variant.rank if variant.scaling == "standard" else math.sqrt(rank / variant.rank)
    alpha = None if variant.alpha is None and variant.scaling == "standard" else (variant.alpha or variant.rank) * ratio
    return dataclasses.replace(variant, rank=rank, alpha=alpha)


def scaled(x: np.ndarray, factor: float) -> np.ndarray:
    """An array times a number, rounded once; the same bits where that is 1."""
    return x if factor == 1 else (x.astype(np.float64) * factor).astype(x.dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal, bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _part(module: Module) -> tuple[int, int, int]:
    assert module.place.part is not None
    return module.place.part


def _start(module: Module) -> int:
    return _part(module)[0]


def _whole(parts: Sequence[Module]) -> bool:
    return sum(stop - start for start, stop, _ in map(_part, parts)) == _part(parts[0])[2]


def _lora(variant: Any) -> LoRA:
    return variant

"""Targets: how a config names modules, so that PEFT finds these and no others."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any


def targets(adapted: Iterable[str], known: Collection[str]) -> list[str] | str:
    """The shortest names that PEFT finds these modules by, and no other that is known: ends, or names in full.

    PEFT takes an entry of a list as a name in full, or as its end after a dot; where a name in full is also the end of
    another, it is a regular expression instead.

    >>> targets(["h.0.attn.q", "h.1.attn.q"], ["h.0.attn.q", "h.1.attn.q", "h.0.attn.k", "h.1.attn.k"])
    ['q']
    >>> targets(["h.1.attn.q"], ["h.0.attn.q", "h.1.attn.q"])
    ['1.attn.q']
    """
    adapted, found = {*adapted}, set()
    ends: dict[str, set[str]] = collections.defaultdict(set)
    for module in {*known, *adapted}:
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            ends[".".join(parts[-i:])].add(module)
    for module in sorted(adapted):
        parts = module.split(".")
        choices = [".".join(parts[-i:]) for i in range(1 if known else len(parts), len(parts) + 1)]
        fitting = [end for end in choices if ends[end] <= adapted]
        if not fitting:
            return exactly(adapted)
        found.add(fitting[0])
    return sorted(found)


def exactly(modules: Iterable[str]) -> str:
    """A regular expression of these names alone.

    >>> exactly(["b.1", "a.1"])
    '(a\\\\.1|b\\\\.1)'
    """
    return f"({'|'.join(re.escape(module) for module in sorted(modules))})"


def patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for each module that has another: the whole name, so that no two overlap.

    >>> patterns({"a.q": 4, "a.k": 4, "a.v": 8})
    (4, {'^a\\\\.v': 8})
    """
    common, _ = max(collections.Counter(values.values()).items(), key=lambda item: (item[1], -item[0]))
    others = {module: value for module, value in sorted(values.items()) if value != common}
    return common, {f"^{re.escape(module)}": value for module, value in others.items()}


def saved(modules: Iterable[str], adapted: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names of `modules_to_save`, in full.

    Raises:
      ValueError: PEFT would take another module for one of them: it looks at how names end, be it after a dot or not.
    """
    modules = sorted(modules)
    for module in modules:
        if odd := [name for name in sorted({*known, *adapted}) if name.endswith(module) and name not in modules]:
            raise ValueError(
                f"'{odd[0]}' ends like '{module}', and PEFT takes both for what modules_to_save names: train both with "
                "Full(), or neither"
            )
        if odd := [name for name in sorted(adapted) if re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name)]:
            raise ValueError(f"'{odd[0]}' is adapted within '{module}', all of which PEFT saves: leave out one of them")
    return modules


def feedforward(inputs: Collection[str], outputs: Iterable[str], names: list[str] | str) -> list[str] | str:
    """IA³'s `feedforward_modules`: those of the names that are for modules whose inputs are scaled.

    PEFT looks at how names end, be it after a dot or not, and wants a list to be among the targets.
    """
    if isinstance(names, str):
        return exactly(inputs) if inputs else []
    found = [name for name in names if any(f".{module}".endswith(f".{name}") for module in inputs)]
    return exactly(inputs) if any(module.endswith(tuple(found)) for module in outputs) else found

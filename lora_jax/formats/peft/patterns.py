"""Patterns: which modules a configuration selects, and what it says of each, as PEFT finds them.

Source: `check_target_module_exists` of `peft.tuners.tuners_utils`, `get_pattern_key` of `peft.utils.other`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lora_jax.formats.peft.regex import matches, parse, spend, steps

MANY = 2000
_PLAIN = re.compile(r"\^?(?:\w|\\?[./-])+")  # a pattern that is a name, whose unescaped dots are any character
Chosen = Callable[[str], bool]


def selected(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Those of a model's modules that `target_modules` selects.

    Args:
      config: As `fields.understood` returns it.
      modules: All modules that there are.

    Raises:
      ValueError: A pattern is none, or not one that is matched in bounded time.

    >>> config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    >>> selected(config, ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.k_proj"])
    ['model.layers.1.q_proj']
    """
    counted, targets, excluded = steps(), config.get("target_modules"), config.get("exclude_modules")
    chosen = _chosen(targets, counted) if targets else lambda module: False
    left_out = [_chosen(excluded, counted)] if excluded else []
    for entry in config.get("modules_to_save") or ():
        tree = parse(rf"(^|.*\.){entry}($|\..*)")
        left_out.append(lambda module, tree=tree: matches(tree, module, counted, whole=False))
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        if isinstance(targets, str):
            raise ValueError("layers_to_transform is for a list of target_modules, and they are a pattern")
        elsewhere = _outside({layers} if isinstance(layers, int) else {*layers}, config.get("layers_pattern"))
        left_out.append(lambda module: module not in (targets or ()) and elsewhere(module))  # names in full are taken
    return [module for module in modules if chosen(module) and not any(out(module) for out in left_out)]


def fitting(names: str | list[str], modules: Iterable[str]) -> list[str]:
    """The modules that a pattern matches in full, or that one of these names is or ends, after a dot.

    >>> fitting(["attn.c_proj"], ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.cross_attn.c_proj"])
    ['h.0.attn.c_proj']
    """
    chosen = _chosen(names, steps())
    return [module for module in modules if chosen(module)]


def feedforward(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The modules whose inputs IA³ scales, and not their outputs: a name in the list may end amid a word.

    >>> feedforward({"feedforward_modules": ["proj"]}, ["up_proj", "up"])
    ['up_proj']
    """
    names = config["feedforward_modules"]
    if isinstance(names, str):
        return fitting(names, modules)
    return [module for module in modules if module.endswith(tuple(names))]


def lookup(patterns: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says of modules: the first entry that matches the end of a name.

    Raises:
      ValueError: A pattern is none, or not one that is matched in bounded time.

    >>> lookup({r"^h\\.0\\.fc": 4, "fc": 2, "h.*": 1}, ["h.0.fc", "h.1.fc", "h.1.up"])
    {'h.0.fc': 4, 'h.1.fc': 2, 'h.1.up': 1}
    """
    values, counted = [*patterns.values()], steps()
    plain, others = _sorted(patterns)
    found = {}
    for module in modules:
        first = min(_plain_matches(module, plain, counted), default=len(values))
        earlier = (i for i, tree in others if i < first and matches(tree, module, counted, whole=False))
        first = next(earlier, first)
        if first < len(values):
            found[module] = values[first]
    return found


def _chosen(names: str | list[str], counted: Iterator[int]) -> Chosen:
    if isinstance(names, str):
        tree = parse(names)
        return lambda module: matches(tree, module, counted)
    wanted = {*names}
    return lambda module: any(end in wanted for end in ends(module))


def _outside(layers: set[int], patterns: str | list[str] | None) -> Chosen:
    """Whether a module is in none of these layers: of its numbers the first, from the third part or after a pattern."""
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    if odd := [pattern for pattern in patterns if not re.fullmatch(r"[\w.]+", pattern)]:
        raise ValueError(f"layers_pattern should be names, such as 'layers', and is {odd[0][:80]!r}")
    number = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]

    def outside(module: str) -> bool:
        match = next((found for pattern in number if (found := re.match(pattern, module))), None)
        return match is None or int(match[1]) not in layers

    return outside


def ends(module: str) -> Iterator[str]:
    """A module's name, and what of it follows each dot."""
    yield module
    for i, character in enumerate(module):
        if character == ".":
            yield module[i + 1 :]


def _sorted(patterns: Mapping[str, Any]) -> tuple[dict[Any, dict[str, int]], list[tuple[int, Any]]]:
    """The patterns that are names, in groups of those that differ in nothing but letters, and the others' trees.

    A model may have a pattern for each of its thousands of modules, which are to be found and not tried one by one.
    """
    plain: dict[Any, dict[str, int]] = {}
    others = []
    for i, pattern in enumerate(patterns):
        if _PLAIN.fullmatch(pattern):
            letters = re.findall(r"\\?.", pattern.removeprefix("^"))
            gaps = tuple(at for at, letter in enumerate(letters) if letter == ".")
            group = plain.setdefault((pattern[0] == "^", len(letters), gaps), {})
            group.setdefault("".join(letter[-1] for letter in letters if letter != "."), i)
        elif len(others) < MANY:
            others.append((i, parse(rf"(.*\.)?({pattern})$")))
        else:
            raise ValueError(f"the configuration has more than {MANY} patterns that are no names: give names instead")
    return plain, others


def _plain_matches(module: str, groups: dict[Any, dict[str, int]], counted: Iterator[int]) -> Iterator[int]:
    """The numbers of the patterns that match, of those that `_sorted` grouped."""
    for (from_start, length, gaps), group in groups.items():
        spend(counted)
        begin = len(module) - length
        if begin == 0 or (begin > 0 and not from_start and module[begin - 1] == "."):
            end = module[begin:]
            kept = "".join(end[i:j] for i, j in zip((0, *(gap + 1 for gap in gaps)), (*gaps, length), strict=True))
            if kept in group:
                yield group[kept]

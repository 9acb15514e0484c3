"""Selection: that a folder has tensors for the modules which its configuration selects, each of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax import tree
from lora_jax.formats.description import shown
from lora_jax.formats.peft.patterns import ends, fitting, lookup, selected

ALL_LINEAR = "all-linear"
BASE = ".base_layer"  # what a second adapter of one module wraps
_TENSOR = re.compile(r"(.+)\.(?:lora|vera|hada|lokr|ia3)_\w+(?:\.\w+)?")


def resolved(config: Mapping[str, Any], tensors: Iterable[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """A configuration whose `rank_pattern` and `alpha_pattern` have modules for keys, checked against both sides.

    Args:
      config: As `read` returned it.
      tensors: The names of the tensors, as `read` returned them.
      kinds: Each module of the model's that has a weight, and each parameter that is in no module, as the kind of its
        layout (see `lora_jax.formats.names`).

    Raises:
      ValueError: A module is selected, and has no tensors, or the reverse; a target is nowhere; or a pattern is none.
    """
    found = {match[1] for name in tensors if (match := _TENSOR.fullmatch(name))}
    expected, targets = _expected(config, kinds), config.get("target_modules")
    if absent := sorted(found - expected - {*_wrapped(kinds)}):
        raise ValueError(f"it adapts {_some(absent)}, which this model does not have{tree.close_to(absent[0], kinds)}")
    if unselected := sorted(found - expected):
        raise ValueError(
            f"it has tensors for {_some(unselected)}, which target_modules {shown(targets)} do not select, so that "
            "PEFT would ignore them: complete target_modules, or take the tensors out"
        )
    missing = sorted(expected - found)
    if missing and not (len(missing) == 1 and _all_linear(targets)):
        raise ValueError(
            f"its target_modules {shown(targets)} select {_some(missing)}, for which it has no tensors, so that PEFT "
            "would leave those as they are: correct target_modules, or save the adapter again"
        )
    entries = [] if isinstance(targets, str) else targets or []
    named = {end for module in found for end in ends(module)}
    if unused := [entry for entry in entries if entry not in named]:
        raise ValueError(
            f"its target_modules name {_some(unused)}, and nothing that has tensors is called so: take it out there, "
            "or load a model that has it"
        )
    patterns = {
        name for name in ("rank_pattern", "alpha_pattern") if name in config and config["peft_type"] != "ADALORA"
    }
    return {**config, **{name: lookup(config[name], [*kinds]) for name in patterns}}


def _expected(config: Mapping[str, Any], kinds: Mapping[str, str]) -> set[str]:
    """The modules that would have adapters, with what they wrap where a module has several parameters that do."""
    modules = [name for name, kind in kinds.items() if "experts" not in kind]
    if _all_linear(config.get("target_modules")):
        linear = [name for name in modules if kinds[name] in ("linear", "conv1d")]
        expected = {*selected({**config, "target_modules": ".*"}, linear)}
    else:
        expected = {*selected(config, modules)}
    parameters = [name for name, kind in kinds.items() if "experts" in kind]
    for name in fitting(config.get("target_parameters") or [], parameters):
        module = name.rpartition(".")[0]
        while module in expected:
            module += BASE
        expected.add(module)
    return expected


def _wrapped(kinds: Mapping[str, str]) -> Iterable[str]:
    """The names under which the model's modules may have adapters."""
    for name, kind in kinds.items():
        module = name.rpartition(".")[0] if "experts" in kind else name
        yield from (module, module + BASE)


def _all_linear(targets: Any) -> bool:
    """PEFT's shorthand, which leaves out the head that makes a model's outputs, whatever it is called."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _some(names: Collection[str]) -> str:
    first = ", ".join(shown(name) for name in [*names][:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"

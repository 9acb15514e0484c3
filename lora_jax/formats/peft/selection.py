"""Selection: that a folder has tensors for the modules which its configuration selects, each of them, and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax import tree
from lora_jax.formats.description import shown
from lora_jax.formats.peft.experts import BASE
from lora_jax.formats.peft.factors import LORA_BIAS
from lora_jax.formats.peft.folder import SHARED
from lora_jax.formats.peft.patterns import ends, feedforward, fitting, lookup, selected

ALL_LINEAR = "all-linear"
_TENSOR = re.compile(r"(.+)\.(?:lora|vera_lambda|hada|lokr|ia3)_\w+(?:\.\w+)*")


def module_of(name: str) -> str | None:
    """The module that a tensor's name says is adapted; None for one that a file has as it is.

    >>> module_of("h.0.attn.lora_A.weight"), module_of("classifier.weight")
    ('h.0.attn', None)
    """
    match = None if name in SHARED else _TENSOR.fullmatch(name)
    return match[1] if match else None


def resolved(config: Mapping[str, Any], tensors: Collection[str], kinds: Mapping[str, str]) -> dict[str, Any]:
    """A configuration checked against both sides, which says by modules what it said by patterns.

    Those are `rank_pattern` and `alpha_pattern`, and the `feedforward_modules` of IA³.

    Args:
      config: As `read` returned it.
      tensors: The names of the tensors, as `read` returned them.
      kinds: Each module of the model's that has a weight, and each parameter that is in no module, as the kind of its
        layout (see `lora_jax.formats.layouts`).

    Raises:
      ValueError: A module is selected, and has no tensors, or the reverse; a target is nowhere; or a pattern is none.
    """
    found = {module for name in tensors if (module := module_of(name)) is not None}
    expected, targets = _expected(config, kinds), config.get("target_modules")
    modules = {name.rpartition(".")[0] if "experts" in kind else name for name, kind in kinds.items()}
    if absent := sorted(
        name for name in found - expected if re.sub(rf"({re.escape(BASE)})*$", "", name) not in modules
    ):
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
    # A module of the model's that is named and not selected is one that another field leaves out.
    named = {end for module in (*found, *kinds) for end in ends(module)}
    if unused := [entry for entry in entries if entry not in named]:
        raise ValueError(
            f"its target_modules name {_some(unused)}, and nothing in this model is called so: take it out there, or "
            "load a model that has it"
        )
    _check_others(config, tensors, found, kinds)
    patterns = {"rank_pattern", "alpha_pattern"} & config.keys() if config["peft_type"] != "ADALORA" else set()
    resolved: dict[str, Any] = {name: lookup(config[name], kinds) for name in patterns}
    if config["peft_type"] == "IA3":
        resolved["feedforward_modules"] = feedforward(config, kinds)
    return {**config, **resolved}


def is_saved(module: str, config: Mapping[str, Any]) -> bool:
    """Whether `modules_to_save` names a module, or one that it is in: PEFT looks at how their names end.

    >>> is_saved("model.mlp.up", {"modules_to_save": ["mlp"]})
    True
    """
    parts, entries = module.split("."), tuple(config.get("modules_to_save") or ())
    return any(".".join(parts[:i]).endswith(entries) for i in range(1, len(parts) + 1))


def _check_others(
    config: Mapping[str, Any], tensors: Collection[str], found: set[str], kinds: Mapping[str, str]
) -> None:
    """Raises where a file has not those biases and whole weights that the configuration speaks of, or has others."""
    biased = {name.removesuffix(LORA_BIAS) for name in tensors if name.endswith(LORA_BIAS)}
    if biased != (found if config.get("lora_bias") else set()):
        raise ValueError(f"{len(biased)} of its {len(found)} modules have lora_B.bias, and lora_bias says otherwise")
    for module in kinds:
        saved = is_saved(module, config)
        if saved and module not in tensors and f"{module}.weight" not in tensors:
            entries = shown(config["modules_to_save"])
            raise ValueError(f"its modules_to_save {entries} are for {module!r} too, and it has no such tensor")
        if f"{module}.bias" in tensors and not saved and config.get("bias", "none") == "none":
            raise ValueError(f"it has a bias of {module!r}, and neither bias nor modules_to_save says so: correct them")


def _expected(config: Mapping[str, Any], kinds: Mapping[str, str]) -> set[str]:
    """The modules that would have adapters, with what they wrap where a module has several parameters that do."""
    modules = [name for name, kind in kinds.items() if "experts" not in kind and kind != "parameter"]
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


def _all_linear(targets: Any) -> bool:
    """PEFT's shorthand, which leaves out the head that makes a model's outputs, whatever it is called."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _some(names: Collection[str]) -> str:
    first = ", ".join(repr(name[:200]) for name in [*names][:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"

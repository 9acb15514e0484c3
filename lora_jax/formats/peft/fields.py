"""Fields: what may be in adapter_config.json, and what of it this library does; anything else is an error.

PEFT fills in what a configuration does not say, and leaves out what it does not know, with a warning at most: either
may give an adapter that is not the one which was trained.

Source: `peft.tuners.*.config` of PEFT 0.21, and of its releases from 0.3 on, which have fewer fields.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax import tree
from lora_jax.formats.description import shown

# What a value may be: how a message calls it, and whether one is it.
KINDS = {
    "count": ("a whole number, 1 or more", lambda x: _is_count(x)),
    "whole": ("a whole number", lambda x: type(x) is int and _is_number(x)),
    "number": ("a finite number", lambda x: _is_number(x)),
    "probability": ("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1),
    "flag": ("true or false", lambda x: type(x) is bool),
    "names": ("a pattern, or a list of names", lambda x: isinstance(x, str) or _are_names(x)),
    "list": ("a list of names", lambda x: _are_names(x)),
    "layers": ("a number, or a list of them", lambda x: _is_layer(x) or _is_list(x, _is_layer)),
    "ranks": ("ranks by pattern", lambda x: _is_dict(x, _is_count)),
    "alphas": ("numbers by pattern", lambda x: _is_dict(x, _is_number)),
    "masks": ("lists of booleans by tensor", lambda x: _is_dict(x, lambda y: _is_list(y, _is_flag))),
    "bias": ("none, all, lora_only or vera_only", lambda x: x in ("none", "all", "lora_only", "vera_only")),
    "initial": ("true, false, or the name of an initialization", lambda x: type(x) in (bool, str)),
    "off": ("off", lambda x: x is False or x in ("", [], {})),
    "any": ("anything", lambda x: True),  # says nothing of the function that an adapter makes of its base
}
REQUIRED = object()


class Field(NamedTuple):
    """A field of a configuration: the kind of its values, what PEFT takes where it is not there, and what it would do.

    One that is REQUIRED must be there, since what PEFT takes instead depends on its release or on the model.
    """

    kind: str
    default: Any = None
    does: str = ""


_COMMON = {
    name: Field("any")
    for name in "peft_type task_type peft_version auto_mapping base_model_name_or_path revision inference_mode".split()
}
# Notes of other programs: Unsloth's, and ms-swift's of dtypes and learning rates.
_COMMON |= {name: Field("any") for name in "unsloth_fixed lora_dtype lorap_lr_ratio lorap_emb_lr".split()}
_TARGETS = {
    "target_modules": Field("names", REQUIRED, "would target what it lists for the model's architecture"),
    "exclude_modules": Field("names"),
    "modules_to_save": Field("list"),
    "layers_to_transform": Field("layers"),
    "layers_pattern": Field("names"),
}
_PATTERNS = {"rank_pattern": Field("ranks", {}), "alpha_pattern": Field("alphas", {})}
_LINEAR = {"fan_in_fan_out": Field("flag", False), "bias": Field("bias", "none")}
_LORA = {
    **_COMMON,
    **_TARGETS,
    **_PATTERNS,
    **_LINEAR,
    "r": Field("count", REQUIRED, "would take 8"),
    "lora_alpha": Field("number", REQUIRED, "would take 8"),
    "lora_dropout": Field("probability", 0.0),
    "use_rslora": Field("flag", False),
    "use_dora": Field("flag", False),
    "lora_bias": Field("flag", False),
    "init_lora_weights": Field("initial", True),
    "target_parameters": Field("list"),
    "use_qalora": Field("off", False, "pools the inputs of A"),
    "alora_invocation_tokens": Field("off", None, "adapts only the tokens after these"),
    "trainable_token_indices": Field("off", None, "trains rows of the embedding"),
    "layer_replication": Field("off", None, "repeats layers of the base"),
    "megatron_config": Field("off", None, "splits the layers as Megatron does"),
    "use_bdlora": Field("off", None, "makes factors block-diagonal"),
    "kasa_config": Field("off", None, "adds singular values, and truncates the base"),
    "velora_config": Field("off", None, "projects the activations that the backward pass keeps"),
    "arrow_config": Field("off", None, "routes between adapters"),
    "monteclora_config": Field("off", None, "draws factors at random"),
    "ensure_weight_tying": Field("flag", False),
    "enable_lora": Field("off", None, "adapts some parts of a fused layer"),
    **{
        name: Field("any")
        for name in (
            "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size",
            "runtime_config", "merge_weights",
        )
    },
}  # fmt: skip
_LYCORIS = {
    **_COMMON,
    **_TARGETS,
    **_PATTERNS,
    "r": Field("count", REQUIRED, "would take 8"),
    "alpha": Field("number", REQUIRED, "would take 8"),
    "rank_dropout": Field("probability", 0.0),
    "module_dropout": Field("probability", 0.0),
    "use_effective_conv2d": Field("flag", False),
    "init_weights": Field("any"),
}
TYPES: dict[str, dict[str, Field]] = {
    "LORA": _LORA,
    "ADALORA": _LORA
    | {name: Field("any") for name in "r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split()}
    | {"target_r": Field("count", 8), "init_r": Field("count", 12), "rank_pattern": Field("masks")},
    "VERA": {
        **_COMMON,
        **_TARGETS,
        **_LINEAR,
        "r": Field("count", REQUIRED, "would take 256"),
        "save_projection": Field("flag", True),
        "vera_dropout": Field("probability", 0.0),
        **{name: Field("any") for name in ("projection_prng_key", "d_initial", "init_weights")},
    },
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS
    | {"decompose_both": Field("flag", False), "decompose_factor": Field("whole", -1)}
    | {"rank_dropout_scale": Field("flag", False)},
    "IA3": {
        **_COMMON,
        **_TARGETS,
        "feedforward_modules": Field("names", REQUIRED, "would take what it lists for the model's architecture"),
        "fan_in_fan_out": Field("flag", False),
        "init_ia3_weights": Field("any"),
    },
}
# Initializations that take something out of the base, which is then another than the one a folder is loaded onto.
CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")


def understood(config: Any) -> dict[str, Any]:
    """A configuration, checked, with every field that its type has, by what PEFT takes where it is not said.

    Args:
      config: What adapter_config.json holds, whatever that is.

    Raises:
      ValueError: It is none, or of a type that is not known here; a field that must be there is not; one is on that is
        not known, or that does what this library does not; one has a value of another kind.

    >>> understood({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]})["use_dora"]
    False
    """
    if not isinstance(config, dict):
        raise ValueError(f"it is {shown(config)}, and no configuration")
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"its peft_type is {shown(kind)}, and what can be loaded is {', '.join(TYPES)}")
    known, off = TYPES[kind], KINDS["off"][1]
    config = {name: value for name, value in config.items() if value is not None}
    for name, value in config.items():
        if name not in known:
            if not off(value):
                raise ValueError(
                    f"its field {shown(name)} is {shown(value)}: {kind} has no such field that is known here, and it "
                    f"may change what the adapter does{tree.close_to(name, known)}"
                )
        elif not KINDS[known[name].kind][1](value):
            _refuse(name, value, known[name])
    for name, field in known.items():
        if field.default is REQUIRED and name not in config and not _is_elsewhere(name, config):
            raise ValueError(f"it has no {name}, for which PEFT {field.does}: write there what was trained with")
    config = {name: _default(field) for name, field in known.items()} | config
    _check_initial(config)
    return config


def seal(config: Mapping[str, Any]) -> str:
    """A digest of what a configuration says of the adapter, but not of its defaults, nor of what says nothing of it.

    >>> config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    >>> seal(config) == seal({**config, "task_type": "CAUSAL_LM"}) != seal({**config, "lora_alpha": 32})
    True
    """
    known = TYPES[config["peft_type"]]
    values = {name: value for name, value in understood(config).items() if name in known and known[name].kind != "any"}
    meant = {name: value for name, value in values.items() if value != _default(known[name])}
    return hashlib.sha256(json.dumps([config["peft_type"], meant], sort_keys=True).encode()).hexdigest()


def _refuse(name: str, value: Any, field: Field) -> None:
    if field.kind == "off":
        raise ValueError(f"its {name} is {shown(value)}, which {field.does}: this library does not")
    raise ValueError(f"its {name} is {shown(value)}, and should be {KINDS[field.kind][0]}")


def _check_initial(config: Mapping[str, Any]) -> None:
    """Raises where factors were made for a base that is not the one which the configuration names."""
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGING):
        remedy = (
            "load that base, and write true there instead"
            if initial.lower() == "loftq"
            else "save it in PEFT with path_initial_model_for_weight_conversion, which makes it the original base's"
        )
        raise ValueError(f"its init_lora_weights is {shown(initial)}, so that it belongs to a changed base: {remedy}")
    if config.get("save_projection") is False:
        raise ValueError(
            "its save_projection is false, so that A and B are PyTorch's random numbers: save it in PEFT with true"
        )


def _default(field: Field) -> Any:
    value = None if field.default is REQUIRED else field.default
    return dict(value) if isinstance(value, dict) else value


def _is_elsewhere(name: str, config: Mapping[str, Any]) -> bool:
    return name == "target_modules" and bool(config.get("target_parameters"))


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and abs(x) < 2**63 and math.isfinite(x)


def _is_count(x: Any) -> bool:
    return type(x) is int and 1 <= x < 2**31


def _is_flag(x: Any) -> bool:
    return type(x) is bool


def _is_layer(x: Any) -> bool:
    return type(x) is int and x >= 0


def _is_list(x: Any, allowed: Any) -> bool:
    return isinstance(x, list) and all(map(allowed, x))


def _are_names(x: Any) -> bool:
    return _is_list(x, lambda name: isinstance(name, str) and name != "")


def _is_dict(x: Any, allowed: Any) -> bool:
    return isinstance(x, dict) and all(map(allowed, x.values()))

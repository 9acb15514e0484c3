"""Load: PEFT's folder as adapters."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams
from lora_jax.formats.layouts import BARE
from lora_jax.formats.names import WEIGHT, Names, Place, locate
from lora_jax.formats.peft import adalora, biases, full, vera
from lora_jax.formats.peft.describe import KINDS, variant_of
from lora_jax.formats.peft.experts import unnested
from lora_jax.formats.peft.factors import MAGNITUDE, axes, forms, merged
from lora_jax.formats.peft.folder import read
from lora_jax.formats.peft.full import UNTIE
from lora_jax.formats.peft.fused import parted, same_bits
from lora_jax.formats.peft.modules import joined, shape_of
from lora_jax.formats.peft.patterns import fitting
from lora_jax.formats.peft.selection import is_saved, resolved
from lora_jax.variants import AdaLoRA, DoRA, LoRA

Tensors = dict[str, np.ndarray]
BASE = ".base_layer.weight"
_WRAPPED = re.compile(r"(.+)\.(original_module|modules_to_save)\.(.+)")


def load(directory: str | os.PathLike[str], params: Any, names: Names) -> LoraParams:
    """Reads a folder that PEFT, or `save`, wrote.

    Args:
      directory: The folder.
      params: The model's parameters, or their shapes: the values are needed where the file has biases that PEFT adds to
        or scales, or a copy of the base's table.
      names: The model's name map.

    Returns:
      `lora_params`, by path.

    Raises:
      FileNotFoundError: The folder or one of its files is not there.
      ValueError: A tensor has no place in the model, or a module lacks one; or the config says what is not known here.

    >>> import tempfile, lora_jax as lora
    >>> params, names = {"head": {"kernel": jnp.ones((8, 4))}}, [("head", "lm_head", "linear")]
    >>> _, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=2)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     load(lora.formats.peft.save(f"{directory}/new", lora_params, names), params, names).keys()
    dict_keys(['head/kernel'])
    """
    config, tensors = read(directory)
    try:
        return _adapters(config, tensors, tree.flatten(params)[0], names)
    except ValueError as error:
        raise ValueError(f"'{directory}': {error}") from error


def _adapters(config: dict[str, Any], tensors: Tensors, leaves: Mapping[str, Any], names: Names) -> LoraParams:
    places = locate(leaves, names)
    weights = [place for place in places.values() if place.role == WEIGHT]
    kinds = {module: place.layout.kind for place in weights for module in place.modules.values()}
    kinds |= {place.tied: "linear" for place in weights if place.tied}
    config = resolved(_with_ties(config, weights), tensors, kinds)
    targeted = fitting(config.get("target_parameters") or [], [name for name, kind in kinds.items() if kind in BARE])
    old = f"{MAGNITUDE}.weight"  # as earlier versions had it
    tensors = {name.removesuffix(".weight") if name.endswith(old) else name: x for name, x in tensors.items()}
    tensors = unnested(tensors, targeted, places, names)
    _drop_copies(config, tensors, places, leaves)
    # A part's module is read by several leaves.
    adapters, variants, used = LoraParams(), dict[str, Any](), set[str]()
    for path, place in places.items():
        if place.role != WEIGHT or not place.site().adaptable:
            continue
        try:
            adapter = _adapter(config, tensors, place, places, variants, used)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
        if adapter is not None:
            if not jnp.issubdtype(leaves[path].dtype, jnp.floating):
                raise ValueError(f"'{path}' is {leaves[path].dtype}, which no adapter is for: dequantize the model")
            adapters[path] = adapter
    biases.resolve(tensors, variants, places, leaves)
    for name in used:
        del tensors[name]
    adapters |= full.taken(tensors, places, leaves)
    if users := [adapter for adapter in adapters.values() if adapter.variant.shared]:
        adapters |= vera.pool(users, tensors)
    if tensors:
        found = ", ".join(sorted(tensors)[:5])
        raise ValueError(f"tensors that have no place in the model: {found}{tree.close_to(found, places)}")
    return jax.tree.map(jnp.asarray, LoraParams({path: adapters[path] for path in _ordered(adapters, leaves)}))


def _with_ties(config: dict[str, Any], weights: Iterable[Place]) -> dict[str, Any]:
    """The config with the head among its targets, if the table that it is tied to is, and PEFT was to tie both."""
    targets = config["target_modules"] or []
    if not config.get("ensure_weight_tying") or isinstance(targets, str):
        return config
    heads = {place.tied for place in weights if place.tied and fitting(targets, place.modules.values())}
    return {**config, "target_modules": sorted({*targets, *heads})}


def _adapter(
    config: Mapping[str, Any],
    tensors: Tensors,
    place: Place,
    places: Mapping[str, Place],
    variants: dict[str, Any],
    used: set[str],
) -> Adapter | None:
    """The adapter of a leaf, if it has one; notes its modules' variants, and the tensors that it is made of."""
    parts, own = {}, {}
    for index, module in place.modules.items():
        variant = _variant(module, config, tensors)
        if variant is None:
            continue
        variants[module] = variant
        factors = _factors(module, variant, place, config, tensors, used)
        if place.tied:
            _check_tied(module, factors, variant, place, config, tensors, used)
        if place.part is not None:
            others = [p for p in places.values() if p.role == WEIGHT and module in p.modules.values()]
            if not isinstance(variant, LoRA | DoRA):
                raise ValueError(f"'{module}' is made of several leaves, and {type(variant).__name__} is none of each")
            part = parted(variant, forms(variant, place.site(), place), factors, place, others)
            if part is None:
                continue
            variant, factors = part
        parts[index], own[index] = factors, variant
    if not parts:
        if place.tied and _variant(place.tied, config, tensors) is not None:
            raise ValueError(f"'{place.tied}' is adapted, which is this leaf too, and not the table: {UNTIE}")
        return None
    if len(parts) < len(place.modules) or len({*own.values()}) > 1:
        lacking = [module for index, module in place.modules.items() if index not in parts]
        why = f"'{lacking[0]}' has no adapter" if lacking else "they have several ranks, alphas or dtypes"
        raise ValueError(f"it holds several modules, and {why}: load the model with layers that are not stacked")
    return joined(parts, next(iter(own.values())), place)


def _variant(module: str, config: Mapping[str, Any], tensors: Tensors) -> Any:
    """The variant of a module, if a tensor is of its adapter."""
    prefix = f"{module}.{_PREFIXES[config['peft_type']]}"
    name = next((name for name in tensors if name.startswith(prefix) and not name.endswith(".bias")), None)
    return None if name is None else variant_of(module, config, tensors[name].dtype.name)


_PREFIXES = {kind: "lora_" for kind in KINDS} | {"VERA": "vera_", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_"}


def _factors(
    module: str,
    variant: Any,
    place: Place,
    config: Mapping[str, Any],
    tensors: Tensors,
    used: set[str],
    tied: bool = False,
) -> Tensors:
    """A module's tensors as factors, with dimensions that are products apart."""
    site, found = place.site(), {}
    own, patterns = axes(variant, site, place), config.get("rank_pattern") or {}
    kept = patterns.get(f"{module}.lora_E") if isinstance(variant, AdaLoRA) else None
    for factor, form in forms(variant, site, place, tied).items():
        name, shape = f"{module}.{form.suffix}", shape_of(form, own[factor], place)
        if name not in tensors:
            raise ValueError(f"'{name}' is not in the file")
        x = tensors[name]
        in_file = tuple(sum(kept) if word == "rank" and kept else n for n, word in zip(shape, form.words, strict=True))
        if x.shape != merged(in_file, form):
            raise ValueError(f"'{name}' has shape {x.shape}, and {variant} of this leaf {merged(in_file, form)}")
        found[factor] = adalora.filled(x.reshape(in_file), form, kept, variant.rank) if kept else x.reshape(shape)
        used.add(name)
    return found


def _check_tied(
    module: str,
    factors: Tensors,
    variant: Any,
    place: Place,
    config: Mapping[str, Any],
    tensors: Tensors,
    used: set[str],
) -> None:
    """Checks that the module that a leaf is tied to has the same adapter, turned."""
    assert place.tied is not None
    other, form = _variant(place.tied, config, tensors), forms(variant, place.site(), place)
    if other is None:
        raise ValueError(f"'{module}' is adapted, and not '{place.tied}', which is this leaf too: {UNTIE}")
    theirs = _factors(place.tied, other, place, config, tensors, used, tied=True)
    turned = forms(variant, place.site(), place, tied=True)
    for factor, x in factors.items():
        order = [turned[factor].words.index(word) for word in form[factor].words]
        if other != variant or not same_bits(x, np.ascontiguousarray(theirs[factor].transpose(order))):
            raise ValueError(f"'{module}' and '{place.tied}', which are one leaf, have adapters that differ: {UNTIE}")


def _drop_copies(
    config: Mapping[str, Any], tensors: Tensors, places: Mapping[str, Place], leaves: Mapping[str, Any]
) -> None:
    """Takes out what PEFT saves twice: of `modules_to_save`, and of the base's tables, which must be the base's.

    A table that is in the file by its own name, and no adapter nor one of `modules_to_save`, may be another than the
    base's, as where the vocabulary was resized: it stays.
    """
    for name in [*tensors]:
        match = _WRAPPED.fullmatch(name)
        owns = (f"{match[1]}.{rest}" for rest in (match[3], match[3].partition(".")[2])) if match else ()
        own = next((own for own in owns if own in tensors), None)
        if match and own:
            if match[2] == "modules_to_save" and not same_bits(tensors[name], tensors[own]):
                raise ValueError(f"'{name}' and '{own}' differ, and are one tensor: save the adapter again")
            del tensors[name]
    owners = full.owned(places)
    for name in [*tensors]:
        plain = name in owners and name.endswith(".weight") and not is_saved(name.rpartition(".")[0], config)
        weight = name if plain else f"{name.removesuffix(BASE)}.weight"
        if weight not in owners or not (plain or name.endswith(BASE)):
            continue
        try:
            ours = full.tensor(weight, owners, places, {}, leaves)
        except ValueError as error:
            raise ValueError(f"'{name}' is the base's, to be compared with params: give them with values") from error
        if same_bits(ours.astype(tensors[name].dtype), tensors[name]):
            del tensors[name]
        elif not plain:
            raise ValueError(
                f"'{name}' is another than the model's: load the weights that the adapter was trained with"
            )


def _ordered(adapters: LoraParams, leaves: Mapping[str, Any]) -> list[str]:
    return [*(path for path in leaves if path in adapters), *(path for path in adapters if path not in leaves)]

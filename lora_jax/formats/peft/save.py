"""Save: adapters as PEFT's folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as serialize

from lora_jax import tree
from lora_jax.factors import Adapter, together
from lora_jax.formats import description
from lora_jax.formats.layouts import BARE
from lora_jax.formats.names import Names, Place, locate
from lora_jax.formats.peft import adalora, biases, full, portable, vera
from lora_jax.formats.peft.describe import BIAS, describe
from lora_jax.formats.peft.experts import nested
from lora_jax.formats.peft.factors import TYPES
from lora_jax.formats.peft.folder import PREFIX, sealed, write
from lora_jax.formats.peft.fused import fuse
from lora_jax.formats.peft.modules import Module, cut
from lora_jax.formats.peft.targeting import saved
from lora_jax.initial.names import changes_base
from lora_jax.variants import Full, LoRA, LoRAXS
from lora_jax.variants.base import SHARED


def save(
    directory: str | os.PathLike[str],
    lora_params: Mapping[str, Adapter],
    names: Names,
    *,
    base: Any = None,
    portable: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Writes adapters as a folder that Hugging Face PEFT loads: adapter_config.json and adapter_model.safetensors.

    Factors are written in their dtypes, and the same adapters give the same bytes. `Full` is written as PEFT's
    `modules_to_save`, or as a bias; `LoRAFA` as the LoRA that it is, and `LoRAXS` as that of A·R and B. A table that is
    also the head gets an adapter in both of its modules. Of `dropout` PEFT has one for all modules, the largest, and
    none for LoHa, LoKr and IA³.

    Args:
      directory: The folder. An adapter that is there is replaced, other files in it stay; its own folder must exist.
      lora_params: What trains, as `split` returned it.
      names: The model's name map, such as `lora_jax.models.llama.NAMES`.
      base: The model's parameters as Hugging Face has them, or their shapes. With them modules have short names, as
        "q_proj", where others in full; and values are needed where PEFT saves more of a module than trains here.
      portable: Whether for servers that know one rank and one alpha, and neither rsLoRA nor modules_to_save: scales are
        then in alpha, or in B, and ranks filled up with zeros.
      base_model_name_or_path: Where PEFT finds the model; kept in the config.
      task_type: PEFT's word for it, such as "CAUSAL_LM"; kept in the config.

    Returns:
      The folder.

    Raises:
      ValueError: The adapters have no form in PEFT, or not there: the message says why and what else can be done. After
        PiSSA, OLoRA and others that change the base, `relative_to` makes adapters of the base as it was.
      OSError: The files cannot be written.

    Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.

    >>> import jax, jax.numpy as jnp, tempfile, lora_jax as lora
    >>> params = {"head": {"kernel": jnp.ones((8, 4))}}
    >>> _, lora_params = lora.split(jax.random.key(0), params, {".*": lora.LoRA(rank=2)})
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sorted(
    ...         path.name for path in save(f"{directory}/new", lora_params, [("head", "lm_head", "linear")]).iterdir()
    ...     )
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    directory = Path(directory)
    try:
        config, tensors = _contents(lora_params, names, base, portable)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    config |= {"base_model_name_or_path": base_model_name_or_path, "task_type": task_type}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write(directory, text.encode(), sealed(serialize(tensors, {"format": "pt"}), config))
    return directory


def _contents(
    lora_params: Mapping[str, Adapter], names: Names, base: Any, to_serve: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A folder's config and tensors."""
    if not lora_params:
        raise ValueError("lora_params is empty, so there is nothing to save")
    description.check(lora_params)
    leaves = {} if base is None else tree.flatten(base)[0]
    own = {path: adapter.site for path, adapter in lora_params.items() if adapter.site.kind != SHARED}
    places = locate(leaves or own, names)
    for path, site in own.items():
        if path not in places or places[path].shape != site.shape:
            what = f"has shape {places[path].shape} in the base" if path in places else "has no place in the names"
            raise ValueError(f"'{path}' {site.shape} {what}: give those of its model{tree.close_to(path, places)}")
        if places[path].part is not None and not leaves:
            raise ValueError(f"'{path}' is a part of their module, and where it begins depends on others: give base=")
    modules = _modules(lora_params, places)
    ranks = None
    if to_serve:
        if any(isinstance(adapter.variant, Full) for adapter in lora_params.values()):
            raise ValueError("servers read LoRA alone, and there is Full() among these: `merge` and serve the weights")
        modules = portable.portable(modules)
    kind = {TYPES[type(module.variant)][0] for module in modules.values()}
    if kind == {"ADALORA"}:
        modules, ranks = adalora.alike(modules)
    lora_params = biases.scaled_by_ia3(lora_params, modules, places, leaves)
    known = (
        {name for place in places.values() for name in (*place.modules.values(), place.tied) if name} if leaves else {}
    )
    known = {*known, *(name.rsplit(".", i)[0] for name in known for i in range(1, name.count(".") + 1))}
    config = describe(modules, known)
    done = full.written(lora_params, places, leaves, modules, config["peft_type"])
    if ranks is not None:
        config["rank_pattern"] = ranks
    config["modules_to_save"] = saved(done.modules, modules, known) or None
    if done.bias != "none" or config["peft_type"] in BIAS:
        config["bias"] = done.bias
    bare = {name for name, module in modules.items() if module.place.layout.kind in BARE}
    deep = nested(bare, places, names)
    tensors = {**done.tensors}
    for name, module in modules.items():
        tensors |= module.tensors(deep.get(name, name))
    tensors = {PREFIX + name: x for name, x in tensors.items()}
    if kind == {"VERA"}:
        tensors |= vera.projections(lora_params, modules)
    # In C order, since safetensors writes an array's memory as it lies.
    return config, {name: np.asarray(x, order="C") for name, x in tensors.items()}


def _modules(lora_params: Mapping[str, Adapter], places: Mapping[str, Place]) -> dict[str, Module]:
    """The adapted modules, by name."""
    parts: dict[str, list[Module]] = {}
    for path, adapter in together(lora_params).items():
        if isinstance(adapter.variant, Full):
            continue
        try:
            adapter, place = _plain(adapter), places[path]
            for name, module in cut(adapter, place).items():
                parts.setdefault(name, []).append(module)
            if place.tied:
                parts |= {name: [module] for name, module in cut(adapter, place, tied=True).items()}
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error
    return {name: own[0] if own[0].place.part is None else fuse(name, own) for name, own in parts.items()}


def _plain(adapter: Adapter) -> Adapter:
    """An adapter of a variant that PEFT has, for the base as it was."""
    variant: Any = adapter.variant
    if isinstance(variant, LoRA) and changes_base(variant.init):
        raise ValueError(
            f"init={variant.init!r} took a part of the base into the factors, and PEFT has the whole base: save what "
            "`relative_to(params, frozen, lora_params)` returns"
        )
    if type(variant) is not LoRAXS:
        return adapter
    factors = {name: np.asarray(x) for name, x in adapter.factors.items()}
    wide = {name: x.astype(np.float64) for name, x in factors.items()}
    batch = len(adapter.site.batch_axes)
    flat = wide["A"].reshape(*wide["A"].shape[:batch], -1, variant.rank)
    a = (flat @ wide["R"]).reshape(wide["A"].shape).astype(factors["A"].dtype)
    lora = LoRA(variant.rank, variant.alpha, dtype=variant.dtype, dropout=variant.dropout)
    return dataclasses.replace(adapter, factors={"A": a, "B": factors["B"]}, variant=lora)

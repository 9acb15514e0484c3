"""The library's own adapter file: one safetensors file, its metadata JSON; no pickle, written at once or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from lora_jax.adapters import applied_to
from lora_jax.factors import Adapter, together
from lora_jax.sites import Site
from lora_jax.variants.base import SHARED, Variant

FORMAT = 1


def save(path: str | os.PathLike[str], lora_params: Mapping[str, Adapter]) -> Path:
    """Writes adapters to one safetensors file: tensors named `path:factor`, variants and axes in its metadata.

    The file appears whole or not at all, and the same adapters give the same bytes.

    Args:
      path: The file to write; one that is there is replaced. Its folder must exist.
      lora_params: Adapters, of any dtypes.

    Returns:
      The path.

    Raises:
      ValueError: There is nothing to save; or a factor is spread over several processes, and none holds it whole.
      OSError: The file cannot be written.

    >>> import jax, jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.load(lora.save(f"{folder}/adapter.safetensors", lora_params))["w"].variant
    LoRA(rank=2, alpha=None, scaling='standard', init='normal', dtype='float32', dropout=0.0)
    """
    if not lora_params:
        raise ValueError(f"{path}: lora_params is empty, so there is nothing to save")
    path = Path(path)
    _check_whole(path, lora_params)
    # In C order, since safetensors writes an array's memory as it lies.
    tensors = {f"{p}:{n}": np.asarray(x, order="C") for p, a in lora_params.items() for n, x in a.factors.items()}
    described = {"format": FORMAT, "adapters": {p: _describe(adapter) for p, adapter in lora_params.items()}}
    # One entry alone: safetensors writes several in no fixed order.
    content = serialize(tensors, {"lora_jax": json.dumps(described, sort_keys=True)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def load(path: str | os.PathLike[str]) -> dict[str, Adapter]:
    """Reads what `save` wrote: the same bits.

    Args:
      path: The file.

    Returns:
      `lora_params`, by path.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no adapter file, is damaged, holds a variant that is not known here, or tensors that do not fit
        their description.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: no whole safetensors file ({error})") from error
    if "lora_jax" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one that lora_jax.save wrote: its metadata is missing")
    try:
        described = json.loads(metadata["lora_jax"])
        version, entries = described["format"], sorted(described["adapters"].items())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version}, and this version reads format {FORMAT}: update lora_jax")
    lora_params = {p: _restore(path, p, entry, tensors) for p, entry in entries}
    if tensors:
        raise ValueError(f"{path}: tensors that belong to no adapter: {', '.join(sorted(tensors)[:5])}")
    _check(path, lora_params)
    return lora_params


def _check_whole(file: Path, lora_params: Mapping[str, Adapter]) -> None:
    """Raises where a factor has parts that no device of this process holds: to gather them takes all processes."""
    for path, adapter in lora_params.items():
        for name, x in adapter.factors.items():
            if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
                raise ValueError(
                    f"{file}: {path!r} has factor {name} spread over several processes, and this one holds only a part "
                    "of it: in all of them, whole = jax.device_put(lora_params, NamedSharding(mesh, PartitionSpec())), "
                    "then save that in one of them"
                )


def _describe(adapter: Adapter) -> dict[str, Any]:
    return _description(adapter.variant, adapter.site)


def _description(variant: Variant, site: Site) -> dict[str, Any]:
    fields = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant) if f.compare}
    axes = {name: getattr(site, name) for name in ("shape", "kind", "batch_axes", "in_axes", "out_axes", "window_axes")}
    return {"variant": type(variant).__name__, "fields": fields, "site": axes}


def _described(entry: dict[str, Any]) -> tuple[Variant, Site]:
    site = {"window_axes": [], **entry["site"]}  # files of earlier versions have none
    axes = {name: tuple(site[name]) for name in ("shape", "batch_axes", "in_axes", "out_axes", "window_axes")}
    return Variant.registry[entry["variant"]](**entry["fields"]), Site(kind=site["kind"], **axes)


# A function of adapters that `jax.export` writes to bytes keeps their variants and axes in the same words.
jax.export.register_pytree_node_serialization(
    Adapter,
    serialized_name="lora_jax.Adapter",
    serialize_auxdata=lambda meta: json.dumps(_description(*meta), sort_keys=True).encode(),
    deserialize_auxdata=lambda text: _described(json.loads(text)),
)


def _restore(file: Path, path: str, entry: dict[str, Any], tensors: dict[str, Any]) -> Adapter:
    """One adapter, its tensors taken out of `tensors`."""
    name = entry.get("variant")
    if name not in Variant.registry:
        known = ", ".join(sorted(Variant.registry))
        raise ValueError(f"{file}: {path!r} is a {name}, and known are {known}: import the module that defines {name}")
    try:
        variant, site = _described(entry)
        names = variant.shared if site.kind == SHARED else variant.names(site)
        factors = {name: tensors.pop(f"{path}:{name}") for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {_misfit(path)}: {error}") from error
    return Adapter(factors, variant, site)


def _check(file: Path, lora_params: Mapping[str, Adapter]) -> None:
    """Raises where a factor's shape is not what its variant makes of its site's."""
    try:
        leaves = together(lora_params)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for path, adapter in leaves.items():
        try:
            applied_to(jax.ShapeDtypeStruct(adapter.site.shape, "float32"), path, adapter)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {_misfit(path)}: {error}") from error


def _misfit(path: str) -> str:
    return f"the adapter at {path!r} does not fit its description"

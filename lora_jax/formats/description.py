"""Description: adapters without their factors, as JSON; every format that keeps them says it in these words."""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.export

from lora_jax import tree
from lora_jax.adapters import applied_to
from lora_jax.factors import Adapter, LoraParams, together
from lora_jax.sites import Site
from lora_jax.variants.base import SHARED, Variant

KINDS = ("linear", "conv", "embedding", "other", "unused", SHARED)
GROUPS = ("batch_axes", "in_axes", "out_axes", "window_axes")
LARGEST = 2**40  # of a dimension


def describe(lora_params: Mapping[str, Adapter]) -> dict[str, Any]:
    """Variants and axes of adapters, by path, as `json.dumps` takes them.

    Raises:
      ValueError: A variant has a field that is no number, string or None.

    >>> import jax.numpy as jnp, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> describe(lora_params)["w"]["variant"], restore(describe(lora_params))["w"].factors
    ('LoRA', {'A': 'w:A', 'B': 'w:B'})
    """
    described = {}
    for path, adapter in lora_params.items():
        try:
            described[path] = _description(adapter.variant, adapter.site)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
    return described


def restore(described: Any) -> LoraParams:
    """The inverse of `describe`, of what JSON gives back, whatever that is.

    Returns:
      Adapters by path, each of whose factors is a string, "path:factor", for the array to be put there, as by
      `jax.tree.map(arrays.__getitem__, ...)`; then `check`.

    Raises:
      ValueError: It describes no adapters, or not as `describe` does, or a variant that is not known here.
    """
    if not isinstance(described, dict) or not described:
        raise ValueError(f"its metadata is damaged: adapters are {shown(described)}, and not entries by path")
    return {path: _restored(path, entry) for path, entry in sorted(described.items())}


def check(lora_params: Mapping[str, Adapter]) -> None:
    """Checks that each factor is what its variant makes of its leaf, by shape.

    Raises:
      ValueError: One is not, or shared factors are missing.
    """
    seen = set()
    for path, adapter in together(lora_params).items():
        if odd := [name for name, x in adapter.factors.items() if not tree.is_array(x)]:
            raise ValueError(f"the adapter at {path!r} has a factor {odd[0]!r} that is no array")
        dtypes = {name: jax.dtypes.canonicalize_dtype(x.dtype) for name, x in adapter.factors.items()}
        factors = {name: jax.ShapeDtypeStruct(x.shape, dtypes[name]) for name, x in adapter.factors.items()}
        form = adapter.variant, adapter.site, *factors.items()
        if form in seen:
            continue
        leaf = jax.ShapeDtypeStruct(adapter.site.shape, "float32")
        try:
            applied_to(leaf, path, Adapter(factors, adapter.variant, adapter.site))
        except Exception as error:  # a variant may be anyone's, and was written for factors that fit
            raise ValueError(_misfit(path, error)) from error
        seen.add(form)


def shown(value: Any, length: int = 80) -> str:
    """The beginning of what a message quotes, which may be anything, as one line."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else reprlib.repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _restored(path: str, entry: Any) -> Adapter:
    name = entry.get("variant") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in Variant.registry:
        which = name if isinstance(name, str) and name.isidentifier() else shown(name)
        known = ", ".join(sorted(Variant.registry))
        raise ValueError(f"{path!r} is a {which}, and known are {known}: import the module that defines {which}")
    try:
        variant, site = _described(entry)
        if site.kind == SHARED and not variant.shared:
            raise ValueError(f"{name} shares no factors")
        names = variant.shared if site.kind == SHARED else variant.names(site)
    except Exception as error:  # a variant that a file names may be anyone's, and fail in any way on its fields
        raise ValueError(_misfit(path, error)) from error
    return Adapter({name: f"{path}:{name}" for name in names}, variant, site)


def _description(variant: Variant, site: Site) -> dict[str, Any]:
    fields = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant) if f.compare}
    for name, value in fields.items():
        if not _is_plain(value):
            raise ValueError(
                f"{type(variant).__name__}({name}={shown(value)}) cannot be written: the fields of a variant "
                "are numbers, strings and None, but for those that only say how factors begin, field(compare=False)"
            )
    axes = {name: [*getattr(site, name)] for name in ("shape", *GROUPS)}
    return {"variant": type(variant).__name__, "fields": fields, "site": {"kind": site.kind, **axes}}


def _described(entry: dict[str, Any]) -> tuple[Variant, Site]:
    _check_keys("it", entry, {"variant", "fields", "site"})
    _check_keys("its fields", entry["fields"])
    if odd := [name for name, value in entry["fields"].items() if not _is_plain(value)]:
        raise ValueError(f"field {odd[0]!r} is {shown(entry['fields'][odd[0]])}, no number, string or None")
    variant = Variant.registry[entry["variant"]](**entry["fields"])
    _check_keys("its site", entry["site"])
    site = {"window_axes": [], **entry["site"]}  # files of earlier versions have none
    _check_keys("its site", site, {"shape", "kind", *GROUPS})
    if site["kind"] not in KINDS:
        raise ValueError(f"a site of kind {shown(site['kind'])}, which is none of {', '.join(KINDS)}")
    shape = _whole_numbers("shape", site["shape"], LARGEST)
    batch, inner, outer, window = (_whole_numbers(name, site[name], len(shape)) for name in GROUPS)
    if len({*batch, *inner, *outer}) < len(batch + inner + outer) or not set(window) <= set(inner):
        raise ValueError(f"axes {batch}, {inner}, {outer}, {window} name a dimension twice, or a window that is not in")
    return variant, Site(shape, site["kind"], batch, inner, outer, window_axes=window)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (str, int, float, bool)


def _check_keys(what: str, entry: Any, keys: set[str] | None = None) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{what} should have entries by name, and is {shown(entry)}")
    if keys is not None and (odd := sorted(keys ^ entry.keys())):
        other = tree.close_to(odd[0], keys)
        raise ValueError(f"{what} has {'no' if odd[0] in keys else 'an unknown'} {odd[0]!r}{other}")


def _whole_numbers(name: str, values: Any, end: int) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64 or not all(type(x) is int and 0 <= x < end for x in values):
        raise ValueError(f"{name} should be a list of up to 64 numbers from 0 to {end - 1}, is {shown(values)}")
    return tuple(values)


def _misfit(path: str, error: Exception) -> str:
    return f"the adapter at {path!r} does not fit its description: {shown(error, 300) or type(error).__name__}"


# A function of adapters that `jax.export` writes to bytes keeps their variants and axes in the same words.
jax.export.register_pytree_node_serialization(
    Adapter,
    serialized_name="lora_jax.Adapter",
    serialize_auxdata=lambda meta: json.dumps(_description(*meta), sort_keys=True).encode(),
    deserialize_auxdata=lambda text: _described(json.loads(text)),
)

"""The library's own adapter file: one safetensors file, its metadata JSON; no pickle, written at once or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as serialize

import lora_jax
from lora_jax import tree
from lora_jax.factors import Adapter, LoraParams
from lora_jax.fingerprint import check_base, fingerprint
from lora_jax.formats import atomic, header
from lora_jax.formats.description import check, describe, restore, shown
from lora_jax.variants.base import SHARED

# A safetensors file's dtypes, of those that JAX has.
DTYPES = {f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
DTYPES |= {"BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "C64": "complex64"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


def save(path: str | os.PathLike[str], lora_params: Mapping[str, Adapter], base: Any = None) -> Path:
    """Writes adapters to one safetensors file: tensors named `path:factor`, variants and axes in its metadata.

    The file appears whole or not at all, and the same adapters give the same bytes.

    Args:
      path: The file to write; one that is there is replaced. Its folder must exist.
      lora_params: Adapters, of any dtypes that safetensors has.
      base: The frozen tree, as `split` returned it, or its `fingerprint`; the file then has that, so that `load` can
        tell it from another base.

    Returns:
      The path.

    Raises:
      ValueError: There is nothing to save; a dtype or a variant's field has no form in a file; `base` does not have the
        leaves; factors are not those of their variant, or of other shapes, as in a bank; or one is spread over several
        processes, and none holds it whole.
      OSError: The file cannot be written; what was there is as it was.

    >>> import tempfile, lora_jax as lora
    >>> params = {"w": jnp.ones((8, 4))}
    >>> frozen, lora_params = lora.split(jax.random.key(0), params, {"w": lora.LoRA(rank=2)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.load(lora.save(f"{folder}/adapter.safetensors", lora_params, frozen), frozen)["w"].variant
    LoRA(rank=2, alpha=None, scaling='standard', init='normal', dtype='float32', dropout=0.0)
    """
    path = Path(path)
    try:
        if not lora_params:
            raise ValueError("lora_params is empty, so there is nothing to save")
        check(lora_params)
        _check_factors(lora_params)
        described = {"format": header.FORMAT, "lora_jax": lora_jax.__version__, "adapters": describe(lora_params)}
        if base is not None:
            described["base"] = _fitting(base, lora_params)
        # In C order, since safetensors writes an array's memory as it lies.
        tensors = {f"{p}:{n}": np.asarray(x, order="C") for p, a in lora_params.items() for n, x in a.factors.items()}
        if odd := _misnamed(tensors, jax.tree.leaves(restore(described["adapters"]))):
            raise ValueError(f"{odd[0]!r} is a factor that its variant does not have, lacks, or has twice: rename it")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # One entry alone: safetensors writes several in no fixed order.
    return atomic.write(path, serialize(tensors, {"lora_jax": json.dumps(described, sort_keys=True)}))


def load(path: str | os.PathLike[str], base: Any = None) -> LoraParams:
    """Reads what `save` wrote: the same bits.

    Args:
      path: The file.
      base: The frozen tree that it is meant for, or its `fingerprint`: it must have the leaves that are adapted, in
        their shapes, and be the one that the file was saved with, if it was with one. Without it, `attach` checks the
        shapes alone.

    Returns:
      `lora_params`, by path.

    Raises:
      FileNotFoundError: There is no such file.
      OSError: It cannot be read, or is no file.
      ValueError: It is no adapter file, is damaged or of a later version, holds a variant that is not known here, or
        tensors that do not fit their description; or it was made for another base.
    """
    path = Path(path)
    try:
        adapters, made_for, _ = header.read(path)
        arrays = _arrays(path.read_bytes())
        if missing := [name for name in jax.tree.leaves(adapters) if name not in arrays]:
            raise ValueError(f"it lacks {missing[0]!r} and {len(missing) - 1} others of the factors that it describes")
        lora_params = jax.tree.map(arrays.pop, adapters)
        if arrays:
            raise ValueError(f"tensors that belong to no adapter: {', '.join(map(repr, sorted(arrays)[:5]))}")
        check(lora_params)
        found = None if base is None else _fitting(base, lora_params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found is not None and made_for is not None:
        check_base(str(path), made_for, found)
    return lora_params


def about(path: str | os.PathLike[str]) -> header.Header:
    """What an adapter file says of itself; no tensor is read.

    Raises:
      OSError: As `load`.
      ValueError: As `load`, of what the header says.
    """
    path = Path(path)
    try:
        return header.read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_factors(lora_params: Mapping[str, Adapter]) -> None:
    """Raises where a factor cannot be written from here: parts that no device of this process holds, or its dtype."""
    for path, adapter in lora_params.items():
        for name, x in adapter.factors.items():
            if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
                raise ValueError(
                    f"{path!r} has factor {name} spread over several processes, and this one holds only a part "
                    "of it: in all of them, whole = jax.device_put(lora_params, NamedSharding(mesh, PartitionSpec())), "
                    "then save that in one of them"
                )
            if x.dtype.name not in DTYPES.values():
                raise ValueError(f"{path!r} has factor {name} in {x.dtype.name}, which safetensors has not: cast it")


def _misnamed(names: Mapping[str, Any], expected: list[str]) -> list[str]:
    """The tensors that would not be found again."""
    odd = sorted(names.keys() ^ {*expected})
    return odd if odd or len(expected) == len(names) else sorted(n for n in names if expected.count(n) > 1)


def _fitting(base: Any, lora_params: Mapping[str, Adapter]) -> dict[str, str]:
    """The fingerprint of a base, if it has the leaves that are adapted."""
    if isinstance(base, Mapping) and base and all(isinstance(value, str) for value in base.values()):
        known = {**base}
    elif any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(base)):
        raise ValueError(
            "base lies on several processes, and one alone cannot tell which it is: in all of them, "
            "base = lora.fingerprint(base), then give that"
        )
    else:
        known = fingerprint(base)
    for path, adapter in lora_params.items():
        if adapter.site.kind == SHARED:
            continue
        if path not in known:
            raise ValueError(
                f"it adapts {path!r}, and base has no such leaf: give the tree of the model that it was made "
                f"for{tree.close_to(path, known)}"
            )
        form = known[path].rpartition(" ")[0]
        if not form.endswith(f"[{','.join(map(str, adapter.site.shape))}]"):
            raise ValueError(
                f"it adapts {path!r} in shape {adapter.site.shape}, and base has {form} there: give the model that it "
                "was made for"
            )
    return known


def _arrays(content: bytes) -> dict[str, jax.Array]:
    """The tensors of a safetensors file, by name."""
    try:
        found = dict(deserialize(content))
    except SafetensorError as error:
        raise ValueError(f"no whole safetensors file ({shown(error)}): copy or save it again") from error
    arrays = {}
    for name, tensor in sorted(found.items()):
        dtype = jnp.dtype(DTYPES[tensor["dtype"]]) if tensor["dtype"] in DTYPES else None
        if dtype is None:
            raise ValueError(f"{name!r} is of dtype {tensor['dtype']}, and known are {', '.join(DTYPES)}")
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"{name!r} is {dtype.name}, of which JAX would lose half the bits: "
                'jax.config.update("jax_enable_x64", True) first'
            )
        try:
            arrays[name] = jnp.asarray(np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]))
        except ValueError as error:
            raise ValueError(f"no array has the shape of {name!r}, {shown(tensor['shape'])}") from error
    return arrays

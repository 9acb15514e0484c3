"""Contents: what an adapter on the disk says of itself, in whichever form it is, without its base."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.factors import Adapter
from lora_jax.formats import adapter, description, native
from lora_jax.formats.huggingface.tensors import headers
from lora_jax.formats.native import DTYPES
from lora_jax.formats.peft import folder, patterns
from lora_jax.formats.peft.describe import variant_of
from lora_jax.formats.peft.selection import module_of
from lora_jax.variants import Full, Variant
from lora_jax.variants.base import FROZEN, SHARED


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf's adapter, or one module's.

    Attributes:
      path: The leaf; in PEFT's folders the module.
      variant: What it has.
      dtypes: Those of its factors.
      trained: How many numbers train.
    """

    path: str
    variant: Variant
    dtypes: tuple[str, ...]
    trained: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an adapter is.

    Attributes:
      form: "native", "peft" or "checkpoints".
      path: The file or the folder.
      size: In bytes.
      entries: By leaf, or by module.
      base: What is said of its base, in words.
      version: Which version of this library wrote it, if it did and says so.
    """

    form: str
    path: Path
    size: int
    entries: tuple[Entry, ...]
    base: str
    version: str


def contents(path: str | os.PathLike[str]) -> Contents:
    """What an adapter says of itself.

    Args:
      path: As `adapter.find` takes it.

    Raises:
      OSError: It is not there, or cannot be read.
      ValueError: It is no adapter, or damaged.

    >>> import jax, jax.numpy as jnp, tempfile, lora_jax as lora
    >>> _, lora_params = lora.split(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(rank=2)})
    >>> contents(lora.save(f"{tempfile.mkdtemp()}/adapter.safetensors", lora_params)).entries[0].trained
    24
    """
    form, found = adapter.find(path)
    return {"native": _native, "peft": _peft, "checkpoints": _checkpoints}[form](found)


def _native(path: Path) -> Contents:
    adapters, base, version = native.about(path)
    forms = {x.name: (DTYPES.get(x.stored, x.stored), x.shape) for x in headers(path)}
    if missing := [name for a in adapters.values() for name in a.factors.values() if name not in forms]:
        raise ValueError(f"{path}: it lacks {missing[0]!r} of the factors that it describes: copy or save it again")
    return Contents("native", path, path.stat().st_size, (*_entries(adapters, forms),), _known(base), version)


def _checkpoints(path: Path) -> Contents:
    from lora_jax.formats import orbax

    _, place, about = orbax.found(path)
    forms = {name: tuple(form) for name, form in about["arrays"]["adapter"].items()}
    entries = (*_entries(description.restore(about["adapters"]), forms),)
    size = sum(file.stat().st_size for file in (place / "adapter").rglob("*") if file.is_file())
    return Contents("checkpoints", place, size, entries, _known(about["base"]), about["versions"]["lora_jax"])


def _peft(path: Path) -> Contents:
    config, tensors = folder.read(path)
    modules: dict[str, list[np.ndarray]] = {}
    others = []
    for name, x in tensors.items():
        module = module_of(name)
        if module is not None:
            modules.setdefault(module, []).append(x)
        elif name not in folder.SHARED:
            others.append((name, x))
    for field in ("rank_pattern", "alpha_pattern"):
        config = {**config, field: patterns.lookup(config.get(field) or {}, modules)}
    if config["peft_type"] == "IA3":
        config["feedforward_modules"] = patterns.feedforward(config, modules)
    entries = [
        Entry(module, variant_of(module, config, own[0].dtype.name), *_counted(own)) for module, own in modules.items()
    ]
    entries += [Entry(name, Full(), *_counted([x])) for name, x in others]
    base = config.get("base_model_name_or_path")
    size = sum((path / name).stat().st_size for name in (folder.CONFIG, folder.WEIGHTS))
    said = f"'{base}', says {folder.CONFIG}" if base else f"{folder.CONFIG} does not say"
    return Contents("peft", path, size, (*entries,), said, "")


def _entries(adapters: Mapping[str, Adapter], forms: Mapping[str, Any]) -> Iterator[Entry]:
    """Of adapters each of whose factors is the name of its dtype and shape."""
    for path, own in adapters.items():
        if own.site.kind == SHARED:
            continue
        labels = own.variant.labels()
        sizes = [math.prod(forms[key][1]) for name, key in own.factors.items() if labels[name] != FROZEN]
        yield Entry(path, own.variant, (*sorted({forms[key][0] for key in own.factors.values()}),), sum(sizes))


def _counted(arrays: list[np.ndarray]) -> tuple[tuple[str, ...], int]:
    return (*sorted({x.dtype.name for x in arrays}),), sum(x.size for x in arrays)


def _known(base: Mapping[str, str] | None) -> str:
    if not base:
        return "the file does not say"
    dtypes = sorted({form.partition("[")[0] for form in base.values()})
    return f"{len(base)} leaves in {' and '.join(dtypes)}, known by a fingerprint of each"

"""Inventory: what of a model can be adapted, leaf by leaf, known by the headers of its files alone."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax import models, tree
from lora_jax.choice import choose
from lora_jax.finetune import task
from lora_jax.finetune.base import open_base
from lora_jax.finetune.targets import PRESETS, rules
from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.formats.names import locate
from lora_jax.models import classifier
from lora_jax.models.classifier import Classifier
from lora_jax.models.decoder import Decoder
from lora_jax.sites import Site

LAYER = re.compile(r"(?<=layers_)\d+(?=/)")  # of a model whose layers are not stacked


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf, or the same leaf of all layers.

    Attributes:
      path: Its path; `*` for the number of a layer.
      paths: All paths that this stands for.
      module: The module of transformers' that it is in; `*` for the number of a layer.
      modules: All of these.
      site: How the model uses it.
      parameters: How many numbers it has, in all layers.
      adapter: How many a LoRA of the rank would have; None where there can be none.
      presets: The targets of `lora-jax train` that take it.
    """

    path: str
    paths: tuple[str, ...]
    module: str
    modules: tuple[str, ...]
    site: Site
    parameters: int
    adapter: int | None
    presets: tuple[str, ...]

    @property
    def shape(self) -> str:
        """What it maps to what, such as "12×512→2048" in twelve layers; the sizes of a leaf that maps nothing."""
        batch, inner, outer = map(math.prod, self.site.sizes())
        layers = batch * len(self.paths) if self.site.adaptable else len(self.paths)
        inside = f"{inner}→{outer}" if self.site.adaptable else "×".join(map(str, self.site.shape))
        return inside if layers == 1 else f"{layers}×{inside}"


def inventory(directory: str | os.PathLike[str], rank: int, targets: str | None = None) -> tuple[list[Entry], int]:
    """The leaves of a model.

    Args:
      directory: Of the model. Of an encoder it shows what a classifier made of it has, but for the head.
      rank: Of the adapters that are counted.
      targets: As of `lora-jax train`: those leaves alone that it takes. None: all.

    Returns:
      The leaves, and how many numbers the model has in all.

    Raises:
      OSError: A file is missing.
      ValueError: The directory is no model's, or `targets` takes nothing.
    """
    config = read_json(Path(directory) / CONFIG)
    encoder = config.get("model_type") == "bert" and not classifier.holds(config)
    base = open_base(directory, labels=("0", "1") if encoder else None, abstract=True)
    leaves, absent = tree.flatten(base.params)[0], {*base.whole} if encoder else set[str]()
    options = {"recompute": True} if isinstance(base.model, Decoder) else {}  # so that the head may be adapted
    sites = lora.sites(task.of(base.model, **options).loss, base.params, _batch(base.model))
    taken = {preset: _taken(preset, leaves, sites, rank, absent) for preset in PRESETS if preset != "all"}
    chosen = leaves.keys() - absent if targets is None else _taken(targets, leaves, sites, rank, absent, strict=True)
    places = locate(leaves, models.names(base.model))
    groups: dict[tuple[str, Any], list[str]] = {}
    for path in leaves:
        if path in chosen:
            groups.setdefault((LAYER.sub("*", path), leaves[path].shape), []).append(path)
    found = []
    for (pattern, _), paths in groups.items():
        site = sites[paths[0]]
        modules = [module for path in paths for module in places[path].modules.values()]
        _, inner, outer = map(math.prod, site.sizes())
        size = math.prod(site.shape)
        fits = site.adaptable and rank <= site.max_rank
        count = rank * (inner + outer) * (size // (inner * outer)) * len(paths) if fits else None
        presets = tuple(preset for preset, own in taken.items() if {*paths} <= own)
        found.append(
            Entry(pattern, tuple(paths), _common(modules), tuple(modules), site, size * len(paths), count, presets)
        )
    return found, sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path not in absent)


def _batch(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loss of a model takes, of no values."""
    length = min(8, model.config.max_position_embeddings)
    names = ("attention_mask",) if isinstance(model, Classifier) else ("mask", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name in ("input_ids", *names)}
    return batch | ({"labels": jax.ShapeDtypeStruct((1,), jnp.int32)} if isinstance(model, Classifier) else {})


def _taken(
    targets: str,
    leaves: Mapping[str, Any],
    sites: Mapping[str, Site],
    rank: int,
    absent: set[str],
    strict: bool = False,
) -> set[str]:
    """The leaves that targets take."""
    try:
        own = rules(targets, lora.LoRA(rank), {path: site for path, site in sites.items() if path not in absent})
    except ValueError:
        if strict:
            raise
        return set()
    return {*choose(own, leaves, sites)} - absent


def _common(modules: Iterable[str]) -> str:
    """
    >>> _common(["model.layers.0.mlp", "model.layers.1.mlp"]), _common(["lm_head"])
    ('model.layers.*.mlp', 'lm_head')
    """
    parts = zip(*(module.split(".") for module in modules), strict=True)
    return ".".join(own[0] if len({*own}) == 1 else "*" for own in map(list, parts))

"""A case's model in JAX: what computes logits from its parameters, and their shapes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, logits
from flax import nnx

Call = Callable[[Any, dict[str, np.ndarray]], np.ndarray]


def flax_model(case: Case, folder: Path) -> tuple[Call, Any]:
    """transformers' Flax model."""
    import transformers

    clip = jnp.clip  # whose arguments had other names when T5 was written
    jnp.clip = lambda x, a_min=None, a_max=None, **others: clip(x, a_min, a_max, **others)
    config = getattr(transformers, case.config).from_pretrained(folder)
    model = getattr(transformers, f"Flax{case.model}")(config, _do_init=False)

    def call(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(logits(model(**batch, params=params)))

    return call, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(model.params_shape_tree))


def tunix_model(case: Case, folder: Path) -> tuple[Call, Any]:
    """Tunix's model. Importing `tunix` imports its trainers, so the packages above the model's file are not run."""
    file, cls, fields = case.tunix or ("", "", {})
    for package in ("tunix", "tunix.generate", "tunix.models", f"tunix.models.{file}"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        sys.modules.setdefault(package, importlib.util.module_from_spec(spec))
    module = importlib.import_module(f"tunix.models.{file}.model")
    if file == "gemma":
        kinds = module.AttentionType
        fields = {
            **fields,
            "attention_types": (kinds.LOCAL_SLIDING if case.map == "GEMMA2" else kinds.GLOBAL, kinds.GLOBAL),
        }
    if file == "gemma3":
        fields = {**fields, "global_base_frequency": 1_000_000, "param_dtype": jnp.float32}
    config = module.ModelConfig(**fields)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: getattr(module, cls)(config, rngs=nnx.Rngs(0))))

    def call(params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
        ids = jnp.asarray(batch["input_ids"])
        length = ids.shape[1]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(ids), length, length))
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        return np.asarray(nnx.merge(graph, params)(ids, positions, None, mask)[0], np.float32)

    return call, shapes

"""Tunix's models, in Flax NNX, with random weights.

Importing `tunix` imports its trainers and all that they need; its models need einops and jaxtyping alone. So the
packages on the way to a model's file are entered here without running their `__init__`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
from case import BATCH, LENGTH, VOCAB, Case, next_token, tokens
from flax import nnx


def _model_file(name: str) -> Any:
    """The module `tunix.models.<name>.model`."""
    for package in ("tunix", "tunix.generate", "tunix.models", f"tunix.models.{name}"):
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"tunix.models.{name}.model")


def _case(model: nnx.Module) -> Case:
    graph, params = nnx.split(model)
    # Some kernels start as zeros; then no gradient would pass them.
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [x + 0.05 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))

    def loss(params, batch):
        logits, _ = nnx.merge(graph, params)(batch, positions, None, mask)
        return next_token(logits, batch)

    return Case(loss, jax.tree.unflatten(treedef, drawn), (tokens(),))


def llama3(remat: str = "NONE") -> Case:
    file = _model_file("llama3")
    config = file.ModelConfig(
        num_layers=2,
        vocab_size=VOCAB,
        embed_dim=192,
        hidden_dim=512,
        num_heads=6,
        head_dim=32,
        num_kv_heads=2,
        rope_theta=500_000,
        norm_eps=1e-5,
        remat_config=file.RematConfig[remat],
    )
    return _case(file.Llama3(config, rngs=nnx.Rngs(0)))


def llama3_remat() -> Case:
    return llama3("DECODER")


def qwen3(**experts: int) -> Case:
    file = _model_file("qwen3")
    config = file.ModelConfig(
        num_layers=2,
        vocab_size=VOCAB,
        embed_dim=192,
        hidden_dim=512,
        num_heads=6,
        head_dim=32,
        num_kv_heads=2,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=not experts,
        **experts,
    )
    return _case(file.Qwen3(config, rngs=nnx.Rngs(0)))


def qwen3_experts() -> Case:
    return qwen3(num_experts=4, num_experts_per_tok=2)


def gemma3() -> Case:
    file = _model_file("gemma3")
    config = file.ModelConfig(
        num_layers=6,
        num_embed=VOCAB,
        embed_dim=192,
        hidden_dim=512,
        num_heads=6,
        head_dim=32,
        num_kv_heads=2,
        sliding_window_size=16,
        param_dtype=jnp.float32,
    )
    return _case(file.Gemma3(config, rngs=nnx.Rngs(0)))

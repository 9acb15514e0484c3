"""Llama as one small function of Hugging Face's state dict, its kernels turned to (in, out)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

HEADS, GROUPS, THETA, EPS = 4, 2, 10_000.0, 1e-6


def from_torch(weights):
    return {name: w if w.ndim == 1 or "embed_tokens" in name else w.T for name, w in weights.items()}


def logits(params, tokens):
    x = params["model.embed_tokens.weight"][tokens]
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in params:
        x = block(params, f"model.layers.{layer}", x)
        layer += 1
    return norm(params, "model.norm", x) @ params["lm_head.weight"]


def block(params, name, x):
    h = norm(params, f"{name}.input_layernorm", x)
    q, k, v = (dense(params, f"{name}.self_attn.{part}_proj", h) for part in "qkv")
    x = x + dense(params, f"{name}.self_attn.o_proj", attention(q, k, v))
    h = norm(params, f"{name}.post_attention_layernorm", x)
    gate, up = (dense(params, f"{name}.mlp.{part}_proj", h) for part in ("gate", "up"))
    return x + dense(params, f"{name}.mlp.down_proj", jax.nn.silu(gate) * up)


def dense(params, name, x):
    y = x @ params[f"{name}.weight"]
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def norm(params, name, x):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * params[f"{name}.weight"]


def attention(q, k, v):
    """Causal attention; a group of query heads shares a head of keys and values."""
    batch, length, _ = q.shape
    q = rotated(q.reshape(batch, length, GROUPS, HEADS // GROUPS, -1))
    k, v = (x.reshape(batch, length, GROUPS, 1, -1) for x in (k, v))
    scores = jnp.einsum("bqghd,bkgod->bghqk", q, rotated(k)) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("bghqk,bkgod->bqghd", jax.nn.softmax(scores), v).reshape(batch, length, -1)


def rotated(x):
    """Rotary positions: the first half of a head's entries turned with the second."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), THETA ** -(np.arange(half) / half))  # (length, half)
    cos, sin = (f(angles).astype(np.float32)[:, None, None, :] for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

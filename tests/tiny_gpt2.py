"""GPT-2 as one small function of Hugging Face's state dict, whose kernels are (in, out) as they are."""

from __future__ import annotations

import jax
import jax.numpy as jnp

HEADS, EPS = 4, 1e-5


def from_torch(weights):
    return dict(weights)


def logits(params, tokens):
    x = params["transformer.wte.weight"][tokens] + params["transformer.wpe.weight"][: tokens.shape[1]]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in params:
        x = block(params, f"transformer.h.{layer}", x)
        layer += 1
    return norm(params, "transformer.ln_f", x) @ params["transformer.wte.weight"].T


def block(params, name, x):
    q, k, v = jnp.split(dense(params, f"{name}.attn.c_attn", norm(params, f"{name}.ln_1", x)), 3, -1)
    x = x + dense(params, f"{name}.attn.c_proj", attention(q, k, v))
    h = dense(params, f"{name}.mlp.c_fc", norm(params, f"{name}.ln_2", x))
    return x + dense(params, f"{name}.mlp.c_proj", jax.nn.gelu(h, approximate=True))


def dense(params, name, x):
    return x @ params[f"{name}.weight"] + params[f"{name}.bias"]


def norm(params, name, x):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


def attention(q, k, v):
    batch, length, width = q.shape
    q, k, v = (x.reshape(batch, length, HEADS, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // HEADS) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(batch, length, width)

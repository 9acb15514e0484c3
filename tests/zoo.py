"""Models in the styles people write them: `ZOO` maps a name to a function that makes (loss, params, batch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

D, F, HEADS, VOCAB, LAYERS, TOKENS = 24, 40, 3, 37, 4, (2, 5)

Model = tuple[Callable[..., jax.Array], Any, tuple[Any, ...]]


def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), TOKENS, 0, VOCAB)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def by_hand() -> Model:
    """Plain arrays: weights on either side, (out, in), stacks read by a loop and by an index, a scaled weight."""
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[-1] ** -0.5

    params = {
        "embed": normal(VOCAB, D),
        "up": normal(LAYERS, D, F),
        "down": normal(LAYERS, F, D),
        "left": normal(D, D),
        "heads": normal(HEADS, D // HEADS, D),
        "transposed": normal(F, D),
        "bias": jnp.zeros(D),
    }

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        x = params["embed"][batch] * jnp.sqrt(jnp.float32(D))
        for i in range(LAYERS):
            x = x + jax.nn.gelu(x @ params["up"][i]) @ params["down"][i]
        x = jnp.swapaxes(params["left"] @ jnp.swapaxes(x, 1, 2), 1, 2)
        x = jnp.einsum("blhk,hkd->bld", x.reshape(*x.shape[:2], HEADS, -1), params["heads"])
        x = jax.nn.relu(x @ (params["transposed"] * 0.5).T) @ params["transposed"] + params["bias"]
        return cross_entropy(x @ params["embed"].T, batch)

    return loss, params, (tokens(),)


class _Block(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        q, k, v = (
            nn.DenseGeneral((HEADS, D // HEADS), dtype=self.dtype, name=name)(y) for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), dtype=self.dtype, name="out")(y)
        y = nn.Dense(F, dtype=self.dtype, name="up")(x)
        return x + nn.Dense(D, dtype=self.dtype, name="down")(nn.silu(y)), None


class _Decoder(nn.Module):
    """A decoder whose layers are scanned over, rematerialized, and whose head is its embedding."""

    dtype: Any = None

    @nn.compact
    def __call__(self, batch: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, D, dtype=self.dtype, name="embed")
        block = nn.scan(
            nn.remat(_Block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        x, _ = block(self.dtype, name="layers")(embed(batch), None)
        return embed.attend(x)


def linen(dtype: Any = None) -> Model:
    model = _Decoder(dtype)
    params = model.init(jax.random.key(0), tokens())

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(model.apply(params, batch), batch)

    return loss, params, (tokens(),)


def bfloat16() -> Model:
    """Linen with parameters and computation in bfloat16."""
    loss, params, batch = linen(jnp.bfloat16)
    return loss, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), batch


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, batch: jax.Array) -> jax.Array:
        x = self.embed(batch)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


def nnx_model() -> Model:
    graph, params = nnx.split(_Net(nnx.Rngs(0)))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params)(batch), batch)

    return loss, params, (tokens(),)


class _Equinox(eqx.Module):
    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(VOCAB, D, key=a)
        self.mlp = eqx.nn.MLP(D, D, F, 2, key=b)
        self.head = eqx.nn.Linear(D, VOCAB, key=c)

    def __call__(self, token: jax.Array) -> jax.Array:
        return self.head(self.mlp(self.embed(token)))


def equinox() -> Model:
    """Kernels (out, in), one token at a time under vmap, and leaves that are functions."""

    def loss(model: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(jax.vmap(model))(batch), batch)

    return loss, _Equinox(jax.random.key(0)), (tokens(),)


ZOO = {"by_hand": by_hand, "linen": linen, "bfloat16": bfloat16, "nnx": nnx_model, "equinox": equinox}

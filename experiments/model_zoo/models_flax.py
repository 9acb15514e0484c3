"""Flax NNX and Linen: layers scanned over and rematerialized, DenseGeneral, Einsum, Conv."""

from __future__ import annotations

import flax.linen as nn
import jax
from case import VOCAB, Case, cross_entropy, images, labels, next_token, tokens
from flax import nnx

D, F, HEADS, LAYERS = 192, 512, 6, 2


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Scanned(nnx.Module):
    def __init__(self, unroll: int, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.layers = stack(rngs)
        self.unroll, self.remat = unroll, remat

    def __call__(self, batch: jax.Array) -> jax.Array:
        def layer(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        body = nnx.remat(layer) if self.remat else layer

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, unroll=self.unroll)
        def forward(block: Block, x: jax.Array) -> jax.Array:
            return body(block, x)

        return self.embed.attend(forward(self.layers, self.embed(batch)))


def _nnx(unroll: bool, remat: bool) -> Case:
    graph, params = nnx.split(Scanned(LAYERS if unroll else 1, remat, nnx.Rngs(0)))

    def loss(params, batch):
        return next_token(nnx.merge(graph, params)(batch), batch)

    return Case(loss, params, (tokens(),))


def nnx_scan(unroll: bool = False) -> Case:
    return _nnx(unroll, remat=False)


def nnx_remat(unroll: bool = False) -> Case:
    return _nnx(unroll, remat=True)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        y = nn.LayerNorm()(x)
        q, k, v = (nn.DenseGeneral((HEADS, D // HEADS), name=name)(y) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(D, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Einsum((D, 2, F), "bld,dcf->blcf", name="up")(x))
        return x + nn.Dense(D, name="down")(y[..., 0, :] * y[..., 1, :]), None


class LinenScanned(nn.Module):
    unroll: int

    @nn.compact
    def __call__(self, batch: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, D, name="embed")
        layers = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            unroll=self.unroll,
        )
        return embed.attend(layers(name="layers")(embed(batch), None)[0])


def linen_scan(unroll: bool = False) -> Case:
    model = LinenScanned(LAYERS if unroll else 1)

    def loss(params, batch):
        return next_token(model.apply(params, batch), batch)

    return Case(loss, model.init(jax.random.key(0), tokens()), (tokens(),))


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(64, (3, 3), strides=2)(x))
        x = nn.relu(nn.Conv(128, (3, 3), kernel_dilation=2)(x))
        x = nn.relu(nn.ConvTranspose(64, (2, 2), strides=(2, 2))(x))
        return nn.Dense(10)(x.mean((1, 2)))


def linen_conv() -> Case:
    model = Convs()
    x = images(32, 32, 16)

    def loss(params, x, y):
        return cross_entropy(model.apply(params, x), y)

    return Case(loss, model.init(jax.random.key(0), x), (x, labels(10)))

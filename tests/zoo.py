"""Models in the styles people write them: `ZOO` maps a name to a function that makes (loss, params, batch)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import checks
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

Model = tuple[Callable[..., jax.Array], Any, tuple[Any, ...]]


class Sizes(NamedTuple):
    """Of a model and its batch. XLA counts a loop's body once, so FLOPs are counted of a model without loops."""

    d: int = 24
    f: int = 40
    heads: int = 3
    vocab: int = 37
    layers: int = 4
    batch: tuple[int, int] = (2, 5)
    loops: bool = True

    def tokens(self) -> jax.Array:
        return jax.device_put(np.random.default_rng(1).integers(self.vocab, size=self.batch, dtype=np.int32))


def drawn(shapes: Any) -> Any:
    """Random weights of these shapes: a model's initializers, run one by one, would each be compiled."""
    seeds = itertools.count()

    def weight(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf  # a function, such as an activation
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return checks.normal(*leaf.shape, seed=next(seeds), scale=max(leaf.shape) ** -0.5, mean=mean)

    return jax.tree_util.tree_map_with_path(weight, shapes)


SMALL = Sizes()
# Wide enough that what XLA counts besides products, such as the casts of bfloat16 on a CPU, is well below 1 %.
WIDE = Sizes(d=288, f=480, vocab=600, layers=2, batch=(4, 32), loops=False)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def by_hand(sizes: Sizes = SMALL) -> Model:
    """Plain arrays: weights on either side, (out, in), stacks read by a loop and by an index, a scaled weight."""
    seeds = itertools.count()
    d, f, heads, vocab, layers, *_ = sizes

    def normal(*shape: int) -> jax.Array:
        return checks.normal(*shape, seed=next(seeds), scale=shape[-1] ** -0.5)

    params = {
        "embed": normal(vocab, d),
        "up": normal(layers, d, f),
        "down": normal(layers, f, d),
        "left": normal(d, d),
        "heads": normal(heads, d // heads, d),
        "transposed": normal(f, d),
        "bias": jnp.zeros(d),
    }

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        x = params["embed"][batch] * jnp.sqrt(jnp.float32(d))
        for i in range(layers):
            x = x + jax.nn.gelu(x @ params["up"][i]) @ params["down"][i]
        x = jnp.swapaxes(params["left"] @ jnp.swapaxes(x, 1, 2), 1, 2)
        x = jnp.einsum("blhk,hkd->bld", x.reshape(*x.shape[:2], heads, -1), params["heads"])
        x = jax.nn.relu(x @ (params["transposed"] * 0.5).T) @ params["transposed"] + params["bias"]
        return cross_entropy(x @ params["embed"].T, batch)

    return loss, params, (sizes.tokens(),)


class _Block(nn.Module):
    sizes: Sizes
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        d, f, heads, *_ = self.sizes
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        q, k, v = (
            nn.DenseGeneral((heads, d // heads), dtype=self.dtype, name=name)(y) for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, name="out")(y)
        y = nn.Dense(f, dtype=self.dtype, name="up")(x)
        return x + nn.Dense(d, dtype=self.dtype, name="down")(nn.silu(y)), None


class _Decoder(nn.Module):
    """A decoder whose layers are scanned over, rematerialized, and whose head is its embedding."""

    sizes: Sizes
    dtype: Any = None

    @nn.compact
    def __call__(self, batch: jax.Array) -> jax.Array:
        sizes = self.sizes
        embed = nn.Embed(sizes.vocab, sizes.d, dtype=self.dtype, name="embed")
        layers = nn.scan(
            nn.remat(_Block, prevent_cse=False) if sizes.loops else _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=sizes.layers,
            unroll=1 if sizes.loops else sizes.layers,
        )
        x, _ = layers(sizes, self.dtype, name="layers")(embed(batch), None)
        return embed.attend(x)


def linen(sizes: Sizes = SMALL, dtype: Any = None) -> Model:
    model = _Decoder(sizes, dtype)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), sizes.tokens()))

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(model.apply(params, batch), batch)

    return loss, params, (sizes.tokens(),)


def bfloat16(sizes: Sizes = SMALL) -> Model:
    """Linen with parameters and computation in bfloat16."""
    loss, params, batch = linen(sizes, jnp.bfloat16)
    return loss, jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(jnp.bfloat16)), params), batch


class _Net(nnx.Module):
    def __init__(self, sizes: Sizes, rngs: nnx.Rngs):
        d, f, heads, vocab, *_ = sizes
        self.embed = nnx.Embed(vocab, d, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, d, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.up = nnx.Linear(d, f, rngs=rngs)
        self.down = nnx.Linear(f, d, rngs=rngs)

    def __call__(self, batch: jax.Array) -> jax.Array:
        x = self.embed(batch)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


def nnx_model(sizes: Sizes = SMALL) -> Model:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: _Net(sizes, nnx.Rngs(0))))
    params = drawn(shapes)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params)(batch), batch)

    return loss, params, (sizes.tokens(),)


class _Equinox(eqx.Module):
    embed: eqx.nn.Embedding
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: jax.Array):
        a, b, c = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(sizes.vocab, sizes.d, key=a)
        self.mlp = eqx.nn.MLP(sizes.d, sizes.d, sizes.f, 2, key=b)
        self.head = eqx.nn.Linear(sizes.d, sizes.vocab, key=c)

    def __call__(self, token: jax.Array) -> jax.Array:
        return self.head(self.mlp(self.embed(token)))


def equinox(sizes: Sizes = SMALL) -> Model:
    """Kernels (out, in), one token at a time under vmap, and leaves that are functions."""

    def loss(model: Any, batch: jax.Array) -> jax.Array:
        return cross_entropy(jax.vmap(jax.vmap(model))(batch), batch)

    return loss, drawn(eqx.filter_eval_shape(_Equinox, sizes, jax.random.key(0))), (sizes.tokens(),)


@functools.cache
def kinds() -> Model:
    """An embedding, layers that are scanned over and rematerialized, a convolution, an expert for each sequence."""
    shapes = {"embed": (11, 8), "layers": (3, 8, 8), "kernel": (3, 8, 8), "experts": (3, 8, 10)}
    params = {name: checks.normal(*shape, seed=len(name), scale=0.5) for name, shape in shapes.items()}

    @jax.checkpoint
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w), None

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x, _ = lax.scan(layer, params["embed"][tokens], params["layers"])
        dims = ("NWC", "WIO", "NWC")
        x = jnp.tanh(lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=dims))
        return jnp.mean(jnp.einsum("eld,edf->elf", x, params["experts"]) ** 2)

    return loss, params, (jnp.arange(21).reshape(3, 7) % 11,)


MAKERS = {"by_hand": by_hand, "linen": linen, "bfloat16": bfloat16, "nnx": nnx_model, "equinox": equinox}
ZOO = {name: functools.cache(make) for name, make in MAKERS.items()}

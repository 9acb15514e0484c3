"""dm-haiku: a transformer, the same with its layers stacked, and its ResNet-18."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp
from case import LENGTH, VOCAB, Case, cross_entropy, images, labels, next_token, tokens

D, F, HEADS, LAYERS = 192, 512, 6, 2


def _block(x: jax.Array) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    y, mask = norm(x), jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH)))
    init = hk.initializers.VarianceScaling()
    x = x + hk.MultiHeadAttention(HEADS, D // HEADS, model_size=D, w_init=init)(y, y, y, mask)
    return x + hk.Linear(D)(jax.nn.gelu(hk.Linear(F)(norm(x))))


def _decoder(layers):
    def forward(batch: jax.Array) -> jax.Array:
        x = hk.Embed(VOCAB, D)(batch) + hk.get_parameter("positions", (LENGTH, D), init=jnp.zeros)
        return hk.Linear(VOCAB)(layers(x))

    model = hk.without_apply_rng(hk.transform(forward))

    def loss(params, batch):
        return next_token(model.apply(params, batch), batch)

    return Case(loss, model.init(jax.random.key(0), tokens()), (tokens(),))


def transformer() -> Case:
    def layers(x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = _block(x)
        return x

    return _decoder(layers)


def layer_stack(unroll: bool = False) -> Case:
    return _decoder(lambda x: hk.layer_stack(LAYERS, unroll=LAYERS if unroll else 1)(_block)(x))


def layer_stack_remat(unroll: bool = False) -> Case:
    return _decoder(lambda x: hk.experimental.layer_stack(LAYERS, unroll=LAYERS if unroll else 1)(hk.remat(_block))(x))


def resnet18() -> Case:
    """In training mode, with the batch's own statistics.

    A ReLU's derivative jumps at zero: of its millions of activations, rounding in float32 puts a few on the other side.
    """
    model = hk.without_apply_rng(hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, is_training=True)))
    x = images(64, 64, 3)
    params, state = model.init(jax.random.key(0), x)

    def loss(params, x, y):
        logits, _ = model.apply(params, state, x)
        return cross_entropy(logits, y)

    return Case(loss, params, (x, labels(10)), double=True)

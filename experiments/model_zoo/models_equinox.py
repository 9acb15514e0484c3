"""Equinox's modules: kernels (out, in), one example at a time under vmap."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from case import LENGTH, Case, images


def mlp() -> Case:
    model = eqx.nn.MLP(256, 256, 512, 3, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return Case(loss, model, (images(LENGTH, 256).reshape(-1, 256),))


def attention() -> Case:
    model = eqx.nn.MultiheadAttention(6, 192, use_query_bias=True, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jax.vmap(lambda x: model(x, x, x))(x) ** 2)

    return Case(loss, model, (images(LENGTH, 192),))


def conv2d() -> Case:
    """With strides and dilation."""
    keys = jax.random.split(jax.random.key(0), 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(8, 64, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(64, 128, 3, stride=2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(128, 128, 3, dilation=2, key=keys[2]),
        ]
    )

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return Case(loss, model, (images(8, 24, 24),))


def conv2d_grouped() -> Case:
    model = eqx.nn.Conv2d(64, 128, 3, groups=2, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    return Case(loss, model, (images(64, 24, 24),))

"""A run of six steps, with dropout, clipping and Adam, that goes on from what is in a folder."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import training
from lora_jax.formats.orbax import Checkpoints

STEPS = 6
BATCHES = np.random.default_rng(0).normal(size=(STEPS, 4, 256)).astype("f")
FROZEN, LORA_PARAMS = lora.split(jax.random.key(0), {"w": jnp.ones((256, 128))}, {"w": lora.LoRA(2, dropout=0.5)})
TX = lora.optimizer(optax.adam(1e-2))
STEP = training.make_step(lambda params, x: jnp.mean((x @ params["w"]) ** 2), TX, clip_norm=1.0)


def state(lora_params=LORA_PARAMS, tx=TX):
    return training.State.create(jax.random.key(1), lora_params, tx)


def run(folder, steps=STEPS, hooks=(), **options):
    """The adapters of a run that goes on from what is in a folder."""
    with Checkpoints(folder, FROZEN, **{"every": 1, "keep_last": 3, **options}) as checkpoints:
        return training.fit(
            STEP, state(), FROZEN, BATCHES, steps=steps, hooks=hooks, checkpoints=checkpoints
        ).lora_params


@functools.cache
def undisturbed():
    return training.fit(STEP, state(), FROZEN, BATCHES, steps=STEPS).lora_params


def listed(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}

"""The run that is killed: python experiments/preemption/train.py FOLDER; the same command goes on where it was cut off.

It does what training does that has a state: dropout, clipping, AdamW under a schedule, shuffled data by grain,
evaluation, early stopping (which never comes), checkpoints of the newest two and of the best. In FOLDER are
`checkpoints/`, `steps` (a line for each step, written at once), and at the end `adapter.safetensors`.
"""

import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import training
from lora_jax.formats.orbax import Checkpoints
from lora_jax.training import hooks

STEPS, EVERY = 120, 3
RNG = np.random.default_rng(0)
PARAMS = {"up": RNG.normal(0, 0.1, (32, 64)).astype("f"), "down": RNG.normal(0, 0.1, (64, 8)).astype("f")}
INPUTS, TARGETS = RNG.normal(size=(256, 32)).astype("f"), RNG.normal(size=(256, 8)).astype("f")


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


def main(folder):
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    frozen, lora_params = lora.split(jax.random.key(0), PARAMS, {".*": lora.LoRA(4, dropout=0.1)})
    tx = lora.optimizer(optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS)))
    step = training.make_step(loss, tx, clip_norm=0.1, accumulate=2)
    state = training.State.create(jax.random.key(1), lora_params, tx)
    data = grain.MapDataset.range(192).shuffle(seed=0).repeat().map(lambda i: (INPUTS[i], TARGETS[i])).batch(16)
    held_out = [(INPUTS[192:], TARGETS[192:])]
    with open(folder / "steps", "a", buffering=1) as steps:
        told = (
            hooks.every(2, hooks.evaluation(lambda lp: training.evaluate(loss, frozen, lp, held_out))),
            hooks.EarlyStopping(patience=STEPS),
            lambda step, state, metrics: print(step, file=steps),
        )
        with Checkpoints(folder / "checkpoints", frozen, every=EVERY, keep_last=2, keep_best=1) as checkpoints:
            print("opened", file=steps)
            state = training.fit(
                step, state, frozen, data.to_iter_dataset(), steps=STEPS, hooks=told, checkpoints=checkpoints
            )
    lora.save(folder / "adapter.safetensors", state.lora_params)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

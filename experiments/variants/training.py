"""An arm on the demo's task: its step, compiled once for all learning rates and seeds, and a run of it."""

import jax
import numpy as np
import optax
from arms import Arm

import lora_jax as lora
from lora_jax import budget
from lora_jax.demo import corpus
from lora_jax.demo.batches import apply, draw, encode, labels
from lora_jax.demo.task import Task
from lora_jax.models.classifier import add_head

STEPS, BATCH, LENGTHS = 125, 16, (16, 32)
VALIDATION = 0.15  # of the files that are trained on, while a rate is chosen
ORTHOGONALITY = 0.1  # of AdaLoRA's term in its loss
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 10, STEPS)


def task_of(pretrained, seed, tuning=False):
    """The task of a seed; while tuning, what is tested on is a share of the files that are trained on."""
    train, test = corpus.load(seed)
    if tuning:
        files = sorted({example.file for example in train})
        held = set(np.random.default_rng(seed).permutation(files)[: round(VALIDATION * len(files))])
        test = [example for example in train if example.file in held]
        train = [example for example in train if example.file not in held]
    model, params = add_head(jax.random.key(seed), pretrained.model, pretrained.params, labels=2)
    buckets = (encode(pretrained.tokenizer, examples, LENGTHS) for examples in (train, test))
    return Task(model, params, *buckets, labels(train), labels(test))


def begin(arm: Arm, task, seed, batches):
    """What is frozen and what trains."""
    sites = lora.sites(task.loss, task.params, batches[0])
    rules = arm.rules
    if arm.informed:
        rules = arm.informed(task.loss, task.params, batches[:4], rules, sites=sites)
    return lora.split(jax.random.key(seed), task.params, rules, sites=sites)


def stepped(arm: Arm, task):
    """The arm's step, jitted: (state, frozen, batch, rate) → (state, loss); and its first state."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), arm.optimizer(SCHEDULE))
    schedule = arm.target_rank and budget.Schedule(STEPS, arm.target_rank, STEPS // 10, STEPS * 3 // 10, 5)

    def start(lora_params):
        return lora_params, tx.init(lora_params), budget.init(lora_params) if schedule else ()

    def step(state, frozen, batch, rate):
        lora_params, opt_state, importance = state

        def objective(lora_params):
            loss = lora.lift(task.loss)(lora.attach(frozen, lora_params), batch)
            return loss + (ORTHOGONALITY * budget.orthogonality(lora_params) if schedule else 0)

        loss, grads = jax.value_and_grad(objective)(lora_params)
        updates, opt_state = tx.update(grads, opt_state, lora_params)
        # Adam's update is linear in the learning rate, so that one program serves all rates.
        lora_params = optax.apply_updates(lora_params, jax.tree.map(lambda u: rate * u, updates))
        if schedule:
            lora_params, importance = budget.allocate(schedule, importance, lora_params, grads)
        return (lora_params, opt_state, importance), loss

    return jax.jit(step, donate_argnums=0), start


def trained(arm: Arm, task, seed, rate, step, start):
    """A run: accuracy on what is tested on, of the merged weights, and the losses."""
    batches = draw(np.random.default_rng(seed), task.train, BATCH, STEPS)
    frozen, lora_params = begin(arm, task, seed, batches)
    state, losses = start(lora_params), []
    for batch in batches:
        state, loss = step(state, frozen, batch, rate)
        losses.append(loss)
    losses = [float(loss) for loss in losses]
    if not np.isfinite(losses[-1]):
        return 0.5, losses
    logits = apply(jax.jit(task.logits), lora.merge(frozen, state[0]), task.test)
    return float(np.mean(logits.argmax(-1) == task.test_labels)), losses

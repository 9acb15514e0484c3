"""The job: a base, its data and its adapter, trained, saved, and evaluated before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax

import lora_jax as lora
from lora_jax import models, training
from lora_jax.finetune import dataset
from lora_jax.finetune.rows import Batches
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.targets import rules
from lora_jax.finetune.task import LanguageModel
from lora_jax.finetune.tokenizer import Tokenizer
from lora_jax.formats import peft


def run(settings: Settings) -> dict[str, float]:
    """Trains."""
    model, shapes = models.load(settings.model, dtype=settings.precision, abstract=True)
    tokenizer = Tokenizer.of(settings.model, model.config.vocab_size, settings.chat_template)
    data = dataset.of(settings, tokenizer, positions=model.config.max_position_embeddings)
    train, test = data.train, data.test
    batches = Batches(train, settings.batch, settings.seed)
    steps = settings.steps or int(settings.epochs * len(train) / settings.batch)
    task = LanguageModel(model, models.names(model))

    variant = lora.LoRA(settings.rank or 8, settings.alpha)
    sites = lora.sites(task.loss, shapes, batches.batch(0))
    model, params = models.load(settings.model, dtype=settings.precision)
    key = jax.random.key(settings.seed)
    frozen, lora_params = lora.split(key, params, rules(settings.targets, variant), sites=sites)
    print(lora.summary(frozen, lora_params))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate or 2e-4, int(steps * settings.warmup), steps
    )
    tx = lora.optimizer(optax.adamw(schedule, weight_decay=0.0))
    step = training.make_step(task.loss, tx, clip_norm=1.0, weight=task.weight, accumulate=settings.accumulate)

    def evaluate(lora_params: Any) -> dict[str, float]:
        if test is None:
            return {"perplexity": float("nan")}
        parts = test.batches(settings.batch)
        return task.metrics(training.evaluate(task.loss, frozen, lora_params, parts, weight=task.weight))

    out = Path(settings.out)
    before = evaluate(lora_params)
    with lora.Checkpoints(out / "checkpoints", frozen) as checkpoints:
        state = training.State.create(key, lora_params, tx)
        hooks = [training.hooks.every(10, training.hooks.log())]
        state = training.fit(step, state, frozen, batches, steps=steps, hooks=hooks, checkpoints=checkpoints)
    after = evaluate(state.lora_params)
    lora.save(out / "adapter.safetensors", state.lora_params, base=frozen)
    peft.save(
        out, state.lora_params, task.names, base=params, base_model_name_or_path=settings.model, task_type=task.peft
    )
    return {"before": before["perplexity"], "after": after["perplexity"]}

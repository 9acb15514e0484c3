"""Prepare: all of a run that is known before a weight is read, and whether it can work."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lora
from lora_jax import training
from lora_jax.finetune import task as tasks
from lora_jax.finetune.base import Base, known_labels, open_base
from lora_jax.finetune.data import dataset
from lora_jax.finetune.data.rows import Batches
from lora_jax.finetune.data.template import day
from lora_jax.finetune.data.tokenizer import Tokenizer
from lora_jax.finetune.optimizing import optimizer, schedule
from lora_jax.finetune.placing import Placing, placing
from lora_jax.finetune.programs import Programs
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.targets import rules
from lora_jax.finetune.task import LanguageModel
from lora_jax.finetune.variant import variant_of
from lora_jax.formats import huggingface
from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.models.decoder import Decoder
from lora_jax.models.llama import Llama
from lora_jax.recipes import save_products

REMAT = {"none": False, "products": save_products, "full": True}
HEADS = ("params/head/kernel", "params/embeddings/embedding")  # what makes a decoder's logits


class Job(NamedTuple):
    """A run before its weights are read.

    Attributes:
      settings: What is asked.
      directory: The model's.
      task: The model, with what it minimizes.
      base: The shapes of the model's parameters, with where they lie.
      tokenizer: The model's.
      data: Rows, and an example.
      batches: Those of the run.
      sites: How the model uses its parameters.
      rules: What trains.
      placing: Where things lie.
      steps: How many.
      key: From which all that is random is drawn.
    """

    settings: Settings
    directory: Path
    task: Any
    base: Any
    tokenizer: Tokenizer
    data: dataset.Dataset
    batches: Batches
    sites: Any
    rules: Any
    placing: Placing
    steps: int
    key: jax.Array


def prepare(settings: Settings) -> Job:
    """What a run will be; headers and data are read, and no weight.

    Raises:
      OSError: A file or directory is missing, or cannot be read.
      ValueError: It cannot work: the message has why, and what to do differently.
    """
    for name in ("model", "data"):
        if not getattr(settings, name):
            raise ValueError(f"--{name} is missing: give it as a flag, or as {name!r} in --config")
    if settings.patience and not settings.eval_every:
        raise ValueError(f"--patience {settings.patience} counts evaluations: say how often, as --eval-every 50")
    if settings.date is not None:
        day(settings.date)
    variant = variant_of(settings)
    where = placing(settings.mesh, settings.batch, settings.accumulate)
    directory = huggingface.directory_of(settings.model)
    config = read_json(directory / CONFIG)
    kind = settings.task or ("classification" if config.get("model_type") == "bert" else "lm")
    classes = (known_labels(directory) or ()) if kind == "classification" else ()
    vocab_size = _whole(directory, config, "vocab_size")
    tokenizer = Tokenizer.of(directory, vocab_size, settings.chat_template, settings.date)
    positions = _whole(directory, config, "max_position_embeddings", "n_positions", default=1024)
    data = dataset.of(settings, tokenizer, kind, positions=positions, classes=classes)
    if kind == "lm" and not data.counts.counted:
        raise ValueError(
            f"--data {settings.data[0]}: no token of it counts for the loss: raise --length, which is {data.length}, "
            "or correct the data"
        )
    if settings.patience and data.test is None:
        raise ValueError(f"--patience {settings.patience}: nothing is held out: give --eval-share or --eval-data")
    base = _base(settings, directory, data.labels, abstract=True)
    if (shardings := where.base(base.model)) is not None:
        base = _base(settings, directory, data.labels, abstract=True, shardings=shardings)
    batches = Batches(data.train, settings.batch, settings.seed)
    steps = settings.steps or max(1, round(settings.epochs * len(data.train) / settings.batch))
    own = tasks.of(_built(settings, where, base.model))
    # A head whose logits are made again can be adapted; nothing is known yet of whether it is to be.
    traced = dataclasses.replace(own, recompute=True) if isinstance(own, LanguageModel) else own
    sites = lora.sites(traced.loss, base.params, batches.batch(0))
    whole = (*map(re.escape, base.whole), *([settings.trains] if settings.trains else []))
    chosen = rules(settings.targets, variant, sites, whole=whole)
    key = jax.random.key(settings.seed)
    return Job(settings, directory, own, base.params, tokenizer, data, batches, sites, chosen, where, steps, key)


def _whole(directory: Path, config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    """What config.json has by the first of these names that is in it."""
    name = next((name for name in names if name in config), None)
    found = default if name is None else config[name]
    if type(found) is not int:
        raise ValueError(f"'{directory / CONFIG}': {name} is {found!r}, and no whole number: download it anew")
    return found


def opened(job: Job) -> Base:
    """The base with its values, where they belong."""
    shardings = job.placing.base(job.task.model)
    return _base(job.settings, job.directory, job.data.labels, shardings=shardings)


def largest(job: Job) -> dict[str, np.ndarray]:
    """A batch as wide as any of the run."""
    rows = job.data.train
    return rows.take([int(np.argmax(rows.sizes))] * job.settings.batch)


def _base(settings: Settings, directory: Path, labels: tuple[str, ...], **options: Any) -> Base:
    return open_base(directory, labels=labels or None, dtype=settings.precision, **options)


def _built(settings: Settings, where: Placing, model: Any) -> Any:
    """The model with what its backward pass makes anew, and with where its activations lie."""
    if isinstance(model, Decoder):
        return model.clone(remat=REMAT[settings.remat], sharding=where.rows if isinstance(model, Llama) else None)
    if settings.remat != "none":
        raise ValueError(f"--remat {settings.remat}: it is for decoders, and {type(model).__name__} is none")
    return model


class Shapes(NamedTuple):
    """What a run's arrays will be, as trees of `jax.ShapeDtypeStruct`, and what is made of them.

    Attributes:
      lora_params: What trains.
      state: That with the optimizer's.
      programs: The step.
      tx: The optimizer.
      task: As of the job, and knowing whether the head is adapted.
    """

    lora_params: Any
    state: Any
    programs: Programs
    tx: Any
    task: Any


def shapes(job: Job, rules: Any = None) -> Shapes:
    """The shapes of a run, and its step.

    Args:
      job: What is prepared.
      rules: What trains, if that is not as the job has it.

    Raises:
      ValueError: As `lora_jax.split`.
    """
    settings, where = job.settings, job.placing
    made = job.rules if rules is None else rules
    lora_params = jax.eval_shape(lambda tree: lora.split(job.key, tree, made, sites=job.sites)[1], job.base)
    tx = optimizer(settings, job.steps)
    state = jax.eval_shape(lambda key, tree: training.State.create(key, tree, tx), job.key, lora_params)
    shardings = None
    if where.mesh is not None:
        shardings = lora.shardings(state, job.base, where.mesh)
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    task = job.task
    if isinstance(task, LanguageModel) and any(path in lora_params for path in HEADS):
        task = dataclasses.replace(task, recompute=True)
    step = training.make_step(
        task.loss,
        tx,
        clip_norm=settings.clip_norm,
        weight=task.weight,
        accumulate=settings.accumulate,
        shardings=shardings,
    )
    return Shapes(state.lora_params, state, Programs(step), tx, task)


def rates(job: Job) -> list[float]:
    """The learning rate of each step."""
    rate = jax.jit(jax.vmap(schedule(job.settings, job.steps)))  # one program, and not one for each operation
    return np.asarray(rate(np.arange(job.steps))).tolist()


def tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are no padding."""
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    if "attention_mask" in batch:
        return int(np.count_nonzero(batch["attention_mask"]))
    return math.prod(batch["input_ids"].shape)

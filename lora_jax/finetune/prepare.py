"""Prepare: all of a run that is known before a weight is read, and whether it can work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lora
from lora_jax import models, training
from lora_jax.finetune import dataset
from lora_jax.finetune.optimizing import optimizer, schedule
from lora_jax.finetune.placing import Placing, placing
from lora_jax.finetune.programs import Programs
from lora_jax.finetune.rows import Batches
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.targets import rules
from lora_jax.finetune.task import LanguageModel
from lora_jax.finetune.tokenizer import Tokenizer
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
      data: Rows, and an example.
      batches: Those of the run.
      sites: How the model uses its parameters.
      rules: What trains.
      placing: Where things lie.
      steps: How many.
      key: From which all that is random is drawn.
    """

    settings: Settings
    directory: str
    task: Any
    base: Any
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
    variant = variant_of(settings)
    where = placing(settings.mesh, settings.batch, settings.accumulate)
    directory = huggingface.directory_of(settings.model)
    config = read_json(directory / CONFIG)
    tokenizer = Tokenizer.of(directory, config.get("vocab_size", 0))
    data = dataset.of(settings, tokenizer)
    _check_rows(settings, data.train, config)
    task, base, whole = opened(settings, str(directory), where, abstract=True)
    batches = Batches(data.train, settings.batch, settings.seed)
    steps = settings.steps or max(1, round(settings.epochs * batches.number / settings.batch))
    sites = lora.sites(task.loss, base, batches.batch(0))
    whole = (*whole, *([settings.trains] if settings.trains else []))
    chosen = rules(settings.targets, variant, sites, whole=whole)
    return Job(
        settings,
        str(directory),
        task,
        base,
        data,
        batches,
        sites,
        chosen,
        where,
        steps,
        jax.random.key(settings.seed),
    )


def opened(settings: Settings, directory: str, where: Placing, *, abstract: bool) -> tuple[Any, Any, tuple[str, ...]]:
    """The task, the parameters or their shapes, and the paths that train whole as the task needs them."""
    model, _ = models.load(directory, dtype=settings.precision, abstract=True)
    model, params = models.load(directory, dtype=settings.precision, abstract=abstract, shardings=where.base(model))
    if isinstance(model, Decoder):
        model = model.clone(remat=REMAT[settings.remat], sharding=where.rows if isinstance(model, Llama) else None)
    elif settings.remat != "none":
        raise ValueError(f"--remat {settings.remat}: it is for decoders, and {type(model).__name__} is none")
    return LanguageModel(model, models.names(model)), params, ()


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
        task = task.__class__(task.model, task.names, recompute=True)
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
    return np.asarray(jax.vmap(schedule(job.settings, job.steps))(np.arange(job.steps))).tolist()


def tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens of a batch are no padding."""
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    if "attention_mask" in batch:
        return int(np.count_nonzero(batch["attention_mask"]))
    return math.prod(batch["input_ids"].shape)


def _check_rows(settings: Settings, rows: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    length = rows["input_ids"].shape[1]
    if positions and length > positions:
        raise ValueError(
            f"--length {settings.length}: rows have {length} tokens, and the model has {positions} positions: take "
            f"--length {positions} or less"
        )
    if "mask" in rows and not rows["mask"].any():
        raise ValueError(
            f"--data {settings.data[0]}: no token counts for the loss: no completion is left within --length "
            f"{settings.length}: raise it, or correct the data"
        )

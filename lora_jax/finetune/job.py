"""The job: a base, its data and its adapter, trained, evaluated and saved; cut off at any moment, it goes on."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from lora_jax import training
from lora_jax.finetune import folder, prepare, report
from lora_jax.finetune.beginning import BATCHES, begun
from lora_jax.finetune.evaluations import Evaluations
from lora_jax.finetune.export import export
from lora_jax.finetune.journal import Diverged, Journal
from lora_jax.finetune.prepare import Job, Shapes
from lora_jax.finetune.programs import nbytes
from lora_jax.finetune.progress import note, progress
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.variant import from_data, learning_rate


def run(settings: Settings, *, dry: bool = False) -> dict[str, Any]:
    """Trains.

    Args:
      settings: What is asked.
      dry: Whether only to show what would be done; then nothing is written, and no weight is read.

    Returns:
      Numbers: of a dry run what it would take, else evaluations before and after.

    Raises:
      OSError: Something cannot be read or written.
      ValueError: It cannot work.
      Diverged: Loss or gradient were not finite.
    """
    unfinished = None
    if not dry:
        if not settings.out:
            raise ValueError("--out is missing: give it as a flag, or as 'out' in --config")
        unfinished = folder.check(settings.out, settings)
        if unfinished and unfinished.done:
            folder.clean(settings.out, settings.keep_checkpoints)
            return report.ended(settings, unfinished.done)
    today = (unfinished and unfinished.date) or datetime.date.today().isoformat()
    settings = dataclasses.replace(settings, date=settings.date or today)  # a run goes on as of the day it began
    job = prepare.prepare(settings)
    digest = folder.digest([job.data.train, job.data.test])
    if unfinished:
        folder.check_data(settings.out, digest)
    params, rules = None, job.rules
    if from_data(settings) and not dry:
        params = prepare.opened(job).params
        batches = [job.placing.batch(job.batches.batch(i)) for i in range(BATCHES)]
        rules = begun(settings, job.task.loss, params, batches, rules, job.sites)
    shapes = prepare.shapes(job, rules)
    if not dry:
        folder.check_space(settings.out, 4 * nbytes(shapes.state))
    batch = job.placing.shapes(prepare.largest(job))
    report.show(job, shapes)
    note("compiling the step ...")
    memory = shapes.programs.memory(shapes.state, job.base, batch)
    report.show_memory(memory)
    if dry:
        return report.show_dry(job, shapes, memory)
    if params is None:
        params = prepare.opened(job).params
    frozen, lora_params = lora.split(job.key, params, rules, sites=job.sites)
    del params
    evaluate = _evaluation(job, shapes, frozen)
    before = unfinished.before if unfinished else None
    if evaluate and not unfinished:
        note("evaluating ...")
        before = evaluate(lora_params)
    if not unfinished:
        folder.begin(settings.out, settings, digest, before)
    try:
        started = time.perf_counter()
        lora_params, evaluations = _fit(job, shapes, frozen, lora_params, before)
        seconds = time.perf_counter() - started
        found: dict[str, Any] = {"before": before, "after": evaluations.last if evaluations else None}
        if evaluations and settings.patience:
            lora_params, found["after"] = lora.load(evaluations.file or ""), evaluations.best
            found["best_step"] = evaluations.step
        found |= export(job, shapes.task, frozen, lora_params)
        found |= {"steps": job.steps, "seconds": round(seconds, 1)}
        folder.done(settings.out, settings, digest, before, found)
        folder.clean(settings.out, settings.keep_checkpoints)
        return report.ended(settings, found)
    except KeyboardInterrupt:
        note(f"{settings.out} holds what is done so far: the same command goes on from there")
        raise


def _evaluation(job: Job, shapes: Shapes, frozen: Any) -> Any:
    """A function from adapters to what they are like on held-out rows; None where there are none."""
    rows, task = job.data.test, shapes.task
    if rows is None:
        return None

    def evaluate(lora_params: Any) -> dict[str, float]:
        batches = (job.placing.batch(part) for part in rows.batches(job.settings.batch))
        return task.metrics(training.evaluate(task.measures, frozen, lora_params, batches, weight=task.weight))

    return evaluate


def _fit(
    job: Job, shapes: Shapes, frozen: Any, lora_params: Any, before: Mapping[str, float] | None
) -> tuple[Any, Evaluations | None]:
    """The adapters after the last step, and what was found on the way."""
    settings, out = job.settings, Path(job.settings.out)
    evaluate = _evaluation(job, shapes, frozen)
    hooks: list[Any] = []
    evaluations = None
    if evaluate and before:
        best = out / folder.BEST if settings.patience else None
        evaluations = Evaluations(evaluate, job.steps, settings.eval_every, before, best)
        hooks.append(evaluations)
        if settings.patience:
            hooks.append(training.hooks.EarlyStopping(patience=settings.patience))
    first = None if before is None else {f"eval_{name}": x for name, x in before.items()}
    state = training.State.create(job.key, lora_params, shapes.tx)
    del lora_params
    with progress(job.steps, settings.log_every) as watch:
        file = out / folder.LOG if jax.process_index() == 0 else None
        feed = Feed(job)
        journal = Journal(file, watch, prepare.rates(job), feed.tokens, every=settings.log_every, first=first)
        with lora.Checkpoints(out / folder.CHECKPOINTS, frozen, every=settings.save_every) as checkpoints:
            try:
                state = training.fit(
                    shapes.programs,
                    state,
                    frozen,
                    feed,
                    steps=job.steps,
                    hooks=[*hooks, journal],
                    checkpoints=checkpoints,
                )
                journal.flush()
            except Diverged as error:
                raise Diverged(
                    f"{error}. Lower --learning-rate, which is {learning_rate(settings):g}, and give another --out; "
                    f"{settings.out} keeps log and checkpoints"
                ) from error
    return state.lora_params, evaluations


class Feed:
    """The batches of a run, each where it belongs; it takes and says its place as they do."""

    def __init__(self, job: Job):
        self.job, self.counts = job, dict[int, int]()
        self.batches = iter(job.batches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.batches)
        self.counts[self.batches.step] = prepare.tokens(batch)
        return self.job.placing.batch(batch)

    def tokens(self, step: int) -> int:
        """How many tokens a step's batch had; asked once."""
        return self.counts.pop(step)

    def get_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self.batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As `get_state` gave it."""
        self.batches.set_state(state)

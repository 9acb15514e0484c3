"""The demo's job: each contender trains what its rules say, on the same sentences, and is judged on others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import lora_jax as lora
from lora_jax import training, tree
from lora_jax.demo import corpus
from lora_jax.demo.batches import apply, draw, encode, labels
from lora_jax.demo.encoder import Encoder
from lora_jax.demo.parallel import everywhere, parallel, spread, whole
from lora_jax.demo.task import Task
from lora_jax.models.classifier import add_head

HEAD = r".*/head/.*"
PROBE_STEPS = 1000  # over all training sentences at once: where its loss has stopped falling

# Told how a stage goes: its name, how many of its steps are done, of how many, and a word on how.
Watch = Callable[[str, int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on, apart from the encoder and the Python.

    Attributes:
      seed: Of all that is random.
      steps: Training steps of each contender but the probe.
      rank: LoRA's.
      full: Whether full fine-tuning competes too.
      batch_size: Sentences in a step.
      lengths: The lengths, in tokens, that batches are padded to. A step compiles once for each; the fewer there are,
        the more padding is computed with.
      sentences: The most to use, to train and to test in all; None for all that there are.
    """

    seed: int = 0
    steps: int = 300
    rank: int = 8
    full: bool = False
    batch_size: int = 32
    lengths: tuple[int, ...] = (16, 24, 48)
    sentences: int | None = None


class Contender(NamedTuple):
    """A way to adapt the encoder: what trains, as rules for a given rank, and the peak learning rate."""

    name: str
    file: str
    rules: Callable[[int], Any]
    learning_rate: float


def query_and_value(rank: int) -> Any:
    """The paper's choice, by name."""
    return {r".*/(query|value)/kernel": lora.LoRA(rank), HEAD: lora.Full()}


def all_linear(rank: int) -> Any:
    """Every linear layer. Rules may ask how the program uses a leaf, so this one knows no names but the head's."""

    def rule(path: str, site: lora.Site) -> lora.Variant | None:
        if "/head/" in path:
            return lora.Full()
        return lora.LoRA(rank) if site.kind == "linear" else None

    return rule


PROBE = Contender("linear probe", "probe", lambda rank: {HEAD: lora.Full()}, 1e-2)
SOME = Contender("LoRA, query and value", "query_value", query_and_value, 2e-3)
ALL = Contender("LoRA, all linear", "all_linear", all_linear, 2e-3)
FULL = Contender("full fine-tuning", "full", lambda rank: {".*": lora.Full()}, 2e-4)


class Result(NamedTuple):
    """A row of the table: share of test sentences that are right, parameters, bytes, seconds, and a loss per step."""

    name: str
    accuracy: float
    trained: int = 0
    share: float = 0.0
    optimizer_bytes: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()


class Agreement(NamedTuple):
    """How far two ways to run one adapter are apart: the largest difference of logits, and the labels that differ."""

    name: str
    difference: float
    labels: int


class Report(NamedTuple):
    """What a run found; verdicts are test sentences with the adapted encoder's probability that they are swapped."""

    encoder: str
    settings: Settings
    sentences: tuple[int, int]
    results: list[Result]
    agreements: list[Agreement]
    verdicts: list[tuple[corpus.Example, float]]


class Trained(NamedTuple):
    """What training leaves."""

    frozen: Any
    lora_params: dict[str, lora.Adapter]
    opt_state: Any
    losses: list[float]


def run(settings: Settings, pretrained: Encoder, out: Path, watch: Watch) -> Report:
    """Train each contender, judge it on the test sentences, and save what it trained in the folder `out`."""
    stage = "reading the documentation"
    watch(stage, 0, 1, "")
    train, test = corpus.load(settings.seed, settings.sentences)
    watch(stage, 1, 1, "")

    model, params = add_head(jax.random.key(settings.seed), pretrained.model, pretrained.params, labels=2)
    buckets = [encode(pretrained.tokenizer, examples, settings.lengths) for examples in (train, test)]
    task = Task(model, everywhere(params), buckets[0], buckets[1], labels(train), labels(test))

    majority = np.bincount(task.train_labels).argmax()
    results = [Result("majority class", float(np.mean(task.test_labels == majority)))]
    agreements, verdicts, logits = [], [], parallel(task.logits)
    for contender in (PROBE, SOME, ALL, *([FULL] if settings.full else [])):
        started = time.perf_counter()
        trained = compete(contender, task, settings, watch)
        seconds = time.perf_counter() - started
        file = lora.save(out / f"{contender.file}.safetensors", trained.lora_params)
        merged = apply(logits, lora.merge(trained.frozen, trained.lora_params), task.test)
        result = judge(contender, task, trained, merged, file, seconds)
        results.append(result)
        if contender is ALL:
            agreements = compare(task, trained, everywhere(lora.load(file)), merged)
            verdicts = list(zip(test, jax.nn.softmax(merged)[:, 1].tolist(), strict=True))
        watch(contender.name, len(trained.losses), len(trained.losses), f"{result.accuracy:.1%} right")
    return Report(pretrained.name, settings, (len(train), len(test)), results, agreements, verdicts)


def judge(contender: Contender, task: Task, trained: Trained, logits: np.ndarray, file: Path, seconds: float) -> Result:
    """A contender's row."""
    trains = lora.summary(trained.frozen, trained.lora_params)
    return Result(
        contender.name,
        accuracy=float(np.mean(logits.argmax(-1) == task.test_labels)),
        trained=trains.trained,
        share=trains.share,
        optimizer_bytes=tree.nbytes(trained.opt_state),
        file_bytes=file.stat().st_size,
        seconds=seconds,
        losses=tuple(trained.losses),
    )


def compete(contender: Contender, task: Task, settings: Settings, watch: Watch) -> Trained:
    """Train one contender: on batches of sentences, or, if it is the probe, on what the frozen encoder makes of all."""
    if contender is PROBE:
        watch(contender.name, 0, PROBE_STEPS, "encoding")
        features = apply(parallel(task.features), task.params, task.train)
        everything = everywhere(jax.device_put({"features": features, "labels": task.train_labels}))
        loss_fn, batches = task.loss_of_head, [everything] * PROBE_STEPS
    else:
        watch(contender.name, 0, settings.steps, "compiling")
        rng = np.random.default_rng(settings.seed)
        loss_fn, batches = task.loss, draw(rng, task.train, settings.batch_size, settings.steps)
    key, rules = jax.random.key(settings.seed), contender.rules(settings.rank)

    def report(done: int, loss: float) -> None:
        watch(contender.name, done, len(batches), f"loss {loss:.3f}" if done < len(batches) else "testing")

    return fit(key, loss_fn, task.params, rules, contender.learning_rate, batches, report)


def fit(
    key: jax.Array,
    loss_fn: Callable[..., jax.Array],
    params: Any,
    rules: Any,
    learning_rate: float,
    batches: Sequence[Any],
    report: Callable[[int, float], None],
) -> Trained:
    """A step on each batch: AdamW, its rate warmed up over a tenth of the steps and brought to zero along a cosine."""
    frozen, lora_params = lora.split(key, params, rules, sites=lora.sites(loss_fn, params, batches[0]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, len(batches) // 10, len(batches))
    tx = lora.optimizer(optax.adamw(schedule))
    step = training.make_step(loss_fn, tx, clip_norm=1.0, shardings=whole())
    losses: list[float] = []

    def note(done: int, state: training.State, metrics: training.Metrics) -> None:
        losses.append(float(metrics["loss"]))
        report(done, losses[-1])

    state = training.State.create(key, everywhere(lora_params), tx)
    state = training.fit(step, state, frozen, map(spread, batches), steps=len(batches), hooks=[note])
    return Trained(frozen, state.lora_params, state.opt_state, losses)


def compare(task: Task, trained: Trained, loaded: Any, merged: np.ndarray) -> list[Agreement]:
    """The merged model's logits on the test sentences, against the lifted one's and those of the adapter's file."""
    lifted = parallel(lora.lift(task.logits))
    others = {
        "lifted": apply(lifted, lora.attach(trained.frozen, trained.lora_params), task.test),
        "saved, loaded, lifted": apply(lifted, lora.attach(task.params, loaded), task.test),
    }
    return [
        Agreement(name, float(np.abs(logits - merged).max()), int(np.sum(logits.argmax(-1) != merged.argmax(-1))))
        for name, logits in others.items()
    ]

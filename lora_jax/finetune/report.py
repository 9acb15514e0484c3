"""Report: what a run will do, before it does it, and what it has done, 80 columns wide."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from typing import Any

import numpy as np

import lora_jax as lora
from lora_jax.finetune import folder
from lora_jax.finetune.data.preview import shown
from lora_jax.finetune.prepare import Job, Shapes
from lora_jax.finetune.programs import Memory
from lora_jax.finetune.settings import Settings
from lora_jax.finetune.variant import from_data, learning_rate
from lora_jax.table import dimensions, quantity, size, table

WIDTH = 80


def show(job: Job, shapes: Shapes) -> None:
    """Prints model, data, what is adapted, and how it trains."""
    settings, summary = job.settings, lora.summary(job.base, shapes.lora_params)
    counts, rows = job.data.counts, job.data.counts.rows
    total = job.steps * settings.batch * counts.tokens / rows
    passes = job.steps * settings.batch / rows
    model = type(getattr(job.task.model, "encoder", job.task.model)).__name__
    parts = f" in {settings.accumulate} parts" if settings.accumulate > 1 else ""
    plus = f", of B {settings.lora_plus_ratio:g} times that" if settings.lora_plus_ratio else ""
    lines = {
        "model": f"{settings.model} ({model}, {quantity(summary.total)} parameters, {_dtypes(job)})",
        "data": _data(job),
        "trains": f"{summary.trained:,} numbers, {summary.share:.2%} of the model's",
        "steps": f"{job.steps:,} of {settings.batch} rows{parts}: {passes:.3g} passes over the data, "
        f"{quantity(total)} tokens",
        "optimizer": f"AdamW, learning rate {learning_rate(settings):g} after a warm-up over "
        f"{settings.warmup:.0%} of the steps, then {settings.schedule}{plus}",
    }
    if job.placing.mesh is not None:
        lines["mesh"] = ", ".join(f"{axis}={size}" for axis, size in job.placing.sizes.items() if size > 1)
    if name := from_data(settings):
        lines["factors"] = f"begin by {name}, from the first batches of the data"
    for name, text in lines.items():
        print(textwrap.fill(text, WIDTH, initial_indent=f"{name:<11}", subsequent_indent=" " * 11))
    print(f"\n{sites(summary)}\n", flush=True)


def sites(summary: lora.Summary) -> str:
    """The table of what is adapted; layers that are alike are one line."""
    groups: dict[Any, list[Any]] = {}
    for row in summary.rows:
        path = re.sub(r"_\d+(?=/)", "_*", row.path.removeprefix("params/"))
        groups.setdefault((path, row.shape, row.variant, row.rank), []).append(row)
    body = []
    for (path, shape, variant, rank), rows in groups.items():
        times = "" if len(rows) == 1 else f"{len(rows)} × "
        numbers = sum(row.parameters for row in rows)
        body.append((_short(path), times + dimensions(shape), variant, str(rank or ""), f"{numbers:,}"))
    foot = ("total", "", "", "", f"{summary.trained:,}")
    return table(("adapted", "shape", "variant", "rank", "parameters"), body, foot, numbers=(3, 4))


def show_memory(memory: Memory) -> None:
    """Prints what a step takes of a device."""
    base, trained, step = map(size, memory)
    text = f"{size(memory.total)} on a device: weights {base}, factors with optimizer {trained}, a step {step}"
    print(textwrap.fill(text, WIDTH, initial_indent=f"{'memory':<11}", subsequent_indent=" " * 11) + "\n", flush=True)


def show_dry(job: Job, shapes: Shapes, memory: Memory) -> dict[str, Any]:
    """Prints an example of the data, and returns the numbers of what was shown."""
    print("example    " + shown(job.data.first, job.tokenizer, job.data.labels) + "\n")
    print("Nothing was written: leave --dry-run out to train.")
    summary = lora.summary(job.base, shapes.lora_params)
    return {
        "steps": job.steps,
        "parameters": summary.trained,
        "total_parameters": summary.total,
        "data": job.data.counts._asdict(),
        "eval_data": job.data.test_counts and job.data.test_counts._asdict(),
        "memory": {**memory._asdict(), "total": memory.total},
    }


def ended(settings: Settings, found: dict[str, Any]) -> dict[str, Any]:
    """Prints what a run has found, what it has written, and what can be done with it."""
    out = settings.out
    print()
    if found["before"] and found["after"]:
        for name, x in found["after"].items():
            print(f"{name + ', held out':<22}{found['before'][name]:.4g} → {x:.4g}")
    if "best_step" in found:
        print(f"The best adapter is that of step {found['best_step']}, and is what was saved.")
    figure = f", {folder.FIGURE}" if importlib.util.find_spec("matplotlib") else ""
    print(f"\n{out} holds {folder.ADAPTER}, {folder.SETTINGS}, {folder.LOG}{figure}")
    if found["peft"]:
        print(textwrap.fill(f"and no folder for PEFT: {found['peft']}", WIDTH))
    else:
        print("and PEFT's adapter_config.json and adapter_model.safetensors.")
    print("\nTo go on:\n")
    for line in following(settings, bool(found.get("labels"))):
        print(f"  {line}")
    return found


def following(settings: Settings, classifies: bool) -> list[str]:
    """Commands that work with what was written."""
    model, out = shlex.quote(settings.model), shlex.quote(settings.out)
    prompt = "A text to classify." if classifies else "How it goes on from here:"
    return [
        f'lora-jax generate --model {model} --adapter {out} --prompt "{prompt}"',
        f"lora-jax info {out} --model {model}",
        f"lora-jax merge --model {model} --adapter {out} --out {out}-merged",
        f"lora-jax train --config {out}/{folder.SETTINGS} --seed 1 --out {out}-1",
    ]


def _data(job: Job) -> str:
    """What the data comes to."""
    data, counts, test = job.data, job.data.counts, job.data.test_counts
    predicted = "" if not counts.counted else f", {quantity(counts.counted)} of them predicted,"
    text = (
        f"{counts.examples:,} examples ({data.kind}), {quantity(counts.tokens)} tokens{predicted} in {counts.rows:,} "
    )
    text += f"rows of up to {data.length}, {counts.padding:.0%} padding"
    for number, what in (
        (counts.cut, "cut"),
        (counts.dropped, "dropped as they are longer"),
        (counts.shared, "left out as they are among those held out"),
    ):
        text += f"; {number:,} {what}" if number else ""
    if data.labels:
        text += f"; classes {', '.join(data.labels)}"
    return text + (f"; held out: {test.examples:,} in {test.rows:,} rows" if test else "; nothing held out")


def _dtypes(job: Job) -> str:
    import jax

    return ", ".join(sorted({str(np.dtype(x.dtype)) for x in jax.tree.leaves(job.base)}))


def _short(path: str, width: int = 38) -> str:
    """A path with its middle left out where it is long.

    >>> _short("encoder/layers_*/attention/query/kernel", 30)
    'encoder/…ttention/query/kernel'
    """
    if len(path) <= width:
        return path
    first = path.split("/")[0]
    return f"{first}/…{path[len(path) - width + len(first) + 2 :]}"

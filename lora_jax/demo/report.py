"""What the demo shows: progress while it works, then a table and examples in the terminal, and a figure."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_jax.demo.job import PROBE, Report, Result, Watch
from lora_jax.table import size

EXAMPLES = 6
SMOOTHING = 20  # steps, of the loss curves


@contextmanager
def progress() -> Iterator[Watch]:
    """A watch for the job, which draws a bar for each stage on stderr; where that is no terminal, it writes a line."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]:>11}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as bars:
        stages: dict[str, TaskID] = {}

        def watch(stage: str, done: int, total: int, note: str) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total, note="")
                if not console.is_terminal:
                    print(f"{stage} ...", file=sys.stderr, flush=True)
            bars.update(stages[stage], completed=done, note=note)

        yield watch


def show(report: Report) -> None:
    """Prints what was found, at most 80 columns wide; plain text where the output is no terminal."""
    console = Console(highlight=False, markup=False)
    train, test = report.sentences
    console.print("\nHave two neighboring words of a sentence been swapped?\n")
    console.print(f"  encoder     {report.encoder}")
    console.print(f"  trained on  {train:,} sentences of Python's documentation, half of them swapped")
    console.print(f"  tested on   {test:,} from other files, half of them swapped\n")
    console.print(_table(report.results))
    console.print("\nLoRA, all linear, beside the same merged into the weights:\n")
    for agreement in report.agreements:
        labels = f"{agreement.labels} labels differ" if agreement.labels else "all labels equal"
        console.print(f"  {agreement.name:<21}  logits differ by {agreement.difference:.1e} at most, {labels}")
    console.print("\nIts probability that a test sentence has been swapped, and whether it is right:\n")
    short = [(example, p) for example, p in report.verdicts if len(example.text) <= 62]
    for example, p in short[:EXAMPLES]:
        console.print(f"  {p:4.0%}  {'right' if (p > 0.5) == example.swapped else 'wrong'}  {example.text}")


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("\nwhat trains", no_wrap=True)
    for name in ("\naccuracy", "parameters\ntrained", "\nshare", "optimizer\nstate", "adapter\nfile", "\ntime"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        cells = [f"{result.accuracy:.1%}"]
        if result.trained:
            sizes = [size(result.optimizer_bytes), size(result.file_bytes)]
            cells += [f"{result.trained:,}", f"{result.share:.2%}", *sizes, f"{result.seconds:.0f} s"]
        table.add_row(result.name, *cells)
    return table


def write(report: Report, file: Path) -> None:
    """Writes settings, versions and results as JSON."""
    content = {
        "encoder": report.encoder,
        "settings": dataclasses.asdict(report.settings),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "optax")},
        "sentences": dict(zip(("train", "test"), report.sentences, strict=True)),
        "results": [result._asdict() for result in report.results],
        "agreements": [agreement._asdict() for agreement in report.agreements],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")


def draw(report: Report, file: Path) -> None:
    """Draws the training losses, and the accuracies beside what each contender trains."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {result.name: f"C{i}" for i, result in enumerate(report.results[1:])}

    for result in report.results:
        if result.losses and result.name != PROBE.name:  # whose steps are of another kind: all sentences at once
            window = 1 + min(SMOOTHING, len(result.losses) // 5)
            smooth = np.convolve(result.losses, np.full(window, 1 / window), mode="valid")
            left.plot(result.losses, color=colors[result.name], alpha=0.2, linewidth=0.8)
            left.plot(np.arange(window - 1, len(result.losses)), smooth, color=colors[result.name], label=result.name)
    left.axhline(math.log(2), color="gray", linestyle=":", linewidth=1, label="a coin's guess")
    left.set(title="Training", xlabel=f"step ({report.settings.batch_size} sentences each)", ylim=(0, 1.1))
    left.set_ylabel("cross-entropy (nats), running mean")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)

    names = [f"{result.name}\n{result.trained:,} trained" for result in report.results]
    bars = right.barh(names, [100 * result.accuracy for result in report.results])
    for bar, result in zip(bars, report.results, strict=True):
        bar.set_color(colors.get(result.name, "gray"))
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.invert_yaxis()
    right.set(title=f"{report.sentences[1]:,} test sentences", xlabel="accuracy (%)", xlim=(0, 100))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)

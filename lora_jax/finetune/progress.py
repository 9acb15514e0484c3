"""Progress: how a run goes, as a bar in a terminal, or as lines where stderr is none."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lora_jax.finetune.evaluations import PREFIX
from lora_jax.finetune.journal import Watch
from lora_jax.table import quantity


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(steps: int, every: int) -> Iterator[Watch]:
    """A watch for a journal.

    Args:
      steps: Of the whole run.
      every: After how many steps there is a line, where there is no terminal.
    """
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[note]}"),
    )
    began: list[tuple[float, int]] = []
    recent: list[Mapping[str, Any]] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, expand=True) as bars:
        bar = bars.add_task("training", total=steps, note="loss ...")

        def watch(step: int, lines: Sequence[Mapping[str, Any]]) -> None:
            if not began:
                began.append((time.perf_counter(), lines[0]["step"] - 1))
            left = _left(step, steps, *began[0])
            bars.update(bar, completed=step, note=_told(lines[-1:], left))
            for line in lines:
                recent.append(line)
                if not console.is_terminal and (line["step"] % every == 0 or line["step"] == steps):
                    note(f"step {line['step']}/{steps}  {_told(recent, left)}")
                    recent.clear()
                if found := _evaluated(line):
                    console.print(f"step {line['step']}/{steps}  held out: {found}", soft_wrap=True)

        yield watch


def _told(lines: Sequence[Mapping[str, Any]], left: str) -> str:
    """The mean loss of some steps, and what else there is of the last.

    >>> _told([{"loss": 2.0, "grad_norm": 0.5, "tokens_per_second": 1200.0}], "0:01:00")
    'loss 2.000  gradient 0.5  1.2 k tokens/s  0:01:00 left'
    """
    last, loss = lines[-1], sum(line["loss"] for line in lines) / len(lines)
    speed = quantity(last["tokens_per_second"])
    return f"loss {loss:.3f}  gradient {last['grad_norm']:.3g}  {speed} tokens/s  {left} left"


def _evaluated(line: Mapping[str, Any]) -> str:
    found = {name.removeprefix(PREFIX): x for name, x in line.items() if name.startswith(PREFIX)}
    return ", ".join(f"{name} {x:.4g}" for name, x in found.items())


def _left(step: int, steps: int, since: float, first: int) -> str:
    """Time left, by what there was."""
    if step == first:
        return "?"
    seconds = (time.perf_counter() - since) / (step - first) * (steps - step)
    return str(datetime.timedelta(seconds=round(seconds)))

"""`lora-jax sites`: what of a model can be adapted; see `lora_jax.finetune.inventory`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.cli.options import MODEL, add_json, check_new, whole, write_json

HELP = "what of a model can be adapted, and what that takes"
DESCRIPTION = """\
What of a model can be adapted: each weight with its path, which --targets of
`train` matches, and its module in transformers; what it maps to what; how many
numbers LoRA trains there; and the presets of --targets that take it. Headers
of the files are read, and no weights.
"""
EXAMPLES = """\
examples:
  lora-jax sites DIR
  lora-jax sites DIR --rank 16 --targets attention
                        what a preset takes
  lora-jax sites DIR --targets ".*/(query|value)/kernel"
                        what a pattern of yours takes
  lora-jax sites hf://Qwen/Qwen3-0.6B --json sites.json

A pattern is a regular expression that matches a path as a whole. What is
neither linear nor an embedding trains whole, by --variant Full or --trains.
"""
SUBJECT = "--model"
PATH, SHAPE, NUMBER = 47, 18, 11  # columns, of 80 with two between each


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=MODEL)
    option("--targets", metavar="WHICH", help="all-linear, attention, or a regex of paths (default: every leaf)")
    option("--rank", metavar="N", type=whole(1), default=8, help="of the adapters (default: %(default)s)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Shows it, and writes what `--json` names."""
    check_new(arguments.json)
    from lora_jax.finetune.inventory import inventory
    from lora_jax.formats import huggingface

    entries, total = inventory(huggingface.directory_of(arguments.model), arguments.rank, arguments.targets)
    print("\n".join(_lines(entries, total, arguments.rank, arguments.targets)))
    described = [
        {**dataclasses.asdict(entry), "site": None, "kind": entry.site.kind, "shape": [*entry.site.shape]}
        for entry in entries
    ]
    for own in described:
        del own["site"]
    content = {"model": arguments.model, "rank": arguments.rank, "parameters": total, "leaves": described}
    write_json(arguments.json, content)


def _lines(entries: Sequence[Any], total: int, rank: int, targets: str | None) -> list[str]:
    """The table, and what presets take."""
    lines = [_line("path", "in→out", f"rank {rank}"), _line("  its module", "kind, and presets"), "─" * 80]
    for entry in (entry for entry in entries if entry.site.adaptable):
        number = f"{entry.adapter:,}" if entry.adapter is not None else f"{entry.site.max_rank} at most"
        lines.append(_line(entry.path, entry.shape, number))
        lines.append(_line(f"  {entry.module}", ", ".join((entry.site.kind, *entry.presets))))
    if others := [entry for entry in entries if not entry.site.adaptable]:
        lines += ["", "These train whole, or not at all:", *(_line(entry.path, entry.shape) for entry in others)]
    lines.append("─" * 80)
    for preset in dict.fromkeys(preset for entry in entries for preset in entry.presets) if targets is None else ():
        lines.append(_sum(preset, [entry for entry in entries if preset in entry.presets], total, rank))
    if targets is not None:
        lines.append(_sum(targets, entries, total, rank))
    return [*lines, f"the model: {total:,} numbers"]


def _line(first: str, second: str, third: str = "") -> str:
    """A line of the table; a path that is too long has one to itself."""
    if len(first) > PATH:
        return first + "\n" + _line("", second, third)
    return f"{first:{PATH}}  {second:{SHAPE}}  {third:>{NUMBER}}".rstrip()


def _sum(targets: str, entries: Sequence[Any], total: int, rank: int) -> str:
    """What training takes there; of a rank that is too high for one of them, which that is."""
    least = min(
        (entry for entry in entries if entry.site.adaptable), key=lambda entry: entry.site.max_rank, default=None
    )
    if least is not None and least.site.max_rank < rank:
        return f"--targets {targets}: rank {rank} is too high for {least.path}, {least.site.max_rank} at most"
    numbers = sum(entry.adapter or 0 for entry in entries)
    matrices = sum(len(entry.modules) for entry in entries)
    return f"--targets {targets}: {numbers:,} numbers train, {numbers / total:.2%}, in {matrices} modules"

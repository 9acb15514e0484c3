"""`lora-jax info`: what an adapter is, and whether it fits a base; see `lora_jax.formats.contents`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.cli import options
from lora_jax.cli.groups import pattern

if TYPE_CHECKING:
    from lora_jax.formats.contents import Contents, Entry

HELP = "what is in an adapter, and does it fit that base?"
DESCRIPTION = """\
Shows what an adapter is: its variant, ranks and alphas, which leaves it adapts,
how many numbers train, and which base it was made for. Its header is enough for
that. With --model, also whether it fits that base: exit status 0 if it does,
and 1 if not, with what does not fit. Of the model a few entries are read.
"""
EXAMPLES = """\
examples:
  lora-jax info adapter.safetensors
  lora-jax info folder                  what train wrote, or PEFT
  lora-jax info run/checkpoints         the newest checkpoint of a run
  lora-jax info run --model base && echo it fits
"""
SUBJECT = "--adapter"
FORMS = {"native": "a native file", "peft": "PEFT's folder", "checkpoints": "a checkpoint of a run"}
WIDTH = 80


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--adapter", metavar="A", type=Path, required=True, help=options.ADAPTER)
    option("--model", metavar="DIR", help=f"the base that it should fit: {options.MODEL}")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Shows it; 1 where it does not fit."""
    from lora_jax.formats.contents import contents

    options.check_new(arguments.json)
    found = contents(arguments.adapter)
    misfit = _misfit(arguments.model, arguments.adapter) if arguments.model else None
    print(_shown(found, arguments.adapter))
    if arguments.model:
        print(f"\nIt does not fit {arguments.model}: {misfit}" if misfit else f"\nIt fits {arguments.model}.")
    options.write_json(arguments.json, _numbers(found) | ({"fits": not misfit} if arguments.model else {}))
    return 1 if misfit else 0


def _misfit(model: str, path: Path) -> str | None:
    """What of an adapter does not fit a model; a model that cannot be read is an error."""
    from lora_jax.cli.base import stored
    from lora_jax.formats import adapter

    base = stored(model, path)
    try:
        adapter.load(path, base.deferred(), base.names, base=base.fingerprint)
    except ValueError as error:
        place = adapter.find(path).path
        return str(error).removeprefix(f"{place}: ").removeprefix(f"'{place}': ")
    return None


def _shown(found: Contents, path: Path) -> str:
    """Lines about the whole, and a table of groups of leaves."""
    from lora_jax.formats import adapter
    from lora_jax.table import size, table

    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in found.entries:
        name = type(entry.variant).__name__
        key = (pattern(entry.path), name, _number(entry.variant, "rank"), _number(entry.variant, "alpha"))
        groups.setdefault(key, []).append(entry)
    trained = sum(entry.trained for entry in found.entries)
    rows = [
        (key[0], str(len(own)), *key[1:], f"{sum(entry.trained for entry in own):,}") for key, own in groups.items()
    ]
    foot = ("total", str(len(found.entries)), "", "", "", f"{trained:,}")
    taken = sum(2 + max(len(row[i]) for row in (*rows, foot, HEAD)) for i in range(1, len(HEAD)))
    rows = [(_short(row[0], max(20, WIDTH - taken)), *row[1:]) for row in rows]
    both = found.form == "native" and path.is_dir() and (path / adapter.PEFT).is_file()
    lines = [
        ("form", f"{FORMS[found.form]}, {found.path}" + (", and PEFT's beside it" if both else "")),
        ("size", f"{size(found.size)}, {trained:,} trained numbers in {', '.join(_dtypes(found))}"),
        ("base", found.base),
        *([("written by", f"lora_jax {found.version}")] if found.version else []),
    ]
    about = "\n".join(f"{name:<12}{text}" for name, text in lines)
    return f"{about}\n\n{table(HEAD, rows, foot, numbers=(1, 3, 4, 5))}"


HEAD = ("leaf", "count", "variant", "rank", "alpha", "numbers")


def _number(variant: Any, name: str) -> str:
    value = getattr(variant, name, None)
    if name == "alpha" and value is None:
        value = getattr(variant, "rank", None) if hasattr(variant, "alpha") else None
    return "" if value is None else f"{value:g}"


def _dtypes(found: Contents) -> list[str]:
    return sorted({dtype for entry in found.entries for dtype in entry.dtypes})


def _short(text: str, width: int) -> str:
    """A text cut in its middle where it is wider."""
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[-half:]}"


def _numbers(found: Contents) -> dict[str, Any]:
    """What --json holds."""

    def of(entry: Entry) -> dict[str, Any]:
        variant: Sequence[tuple[str, Any]] = [*vars(entry.variant).items()]
        plain = {name: value for name, value in variant if isinstance(value, str | int | float | None)}
        return {"variant": type(entry.variant).__name__, **plain, "dtypes": entry.dtypes, "trained": entry.trained}

    return {
        "form": found.form,
        "path": str(found.path),
        "bytes": found.size,
        "base": found.base,
        "version": found.version,
        "trained": sum(entry.trained for entry in found.entries),
        "leaves": {entry.path: of(entry) for entry in found.entries},
    }

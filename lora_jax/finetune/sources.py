"""Sources: files of data as records, each with its place, for errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """One entry of a file.

    Attributes:
      fields: What it holds, by name: "text", "prompt" and "completion", "messages", "label".
      where: The file and the line, for errors.
    """

    fields: dict[str, Any]
    where: str


def read(file: str | Path) -> Iterator[Record]:
    """The records of a file.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It cannot be read as what its name says; the message has the line.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of data: correct --data")
    if file.suffix == ".txt":
        yield Record({"text": file.read_text()}, f"{file}:1")
        return
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            yield Record(json.loads(line), f"{file}:{number}")

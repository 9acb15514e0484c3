"""Sources: files of data as records, each with its file and line, for errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BOM = b"\xef\xbb\xbf"  # with which some editors begin a file in UTF-8
LONGEST = 2**31 - 1  # characters of a csv field; the module's own limit is 131072


class Record(NamedTuple):
    """One entry of a file.

    Attributes:
      fields: What it holds, by name.
      file: The file, as it was given.
      line: The line that it begins in, counted from 1; of .parquet, the row.
    """

    fields: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """The place, for errors.

        >>> Record({}, "data.jsonl", 7).where
        'data.jsonl:7'
        """
        return f"{self.file}:{self.line}"


def read(file: str | Path) -> Iterator[Record]:
    """The records of a file, one after the other.

    Args:
      file: By what its name ends with: `.jsonl`, an object on each line; `.csv`, whose first row has the names;
        `.parquet`; or `.txt`, which is one record, {"text": all of it}. Text is UTF-8.

    Raises:
      FileNotFoundError: There is no such file.
      IsADirectoryError: It is a directory.
      ModuleNotFoundError: It is .parquet, and pyarrow is not installed.
      ValueError: It cannot be read as what its name says, or holds nothing; the message has the line.

    >>> list(read("no/such.jsonl"))
    Traceback (most recent call last):
    FileNotFoundError: no/such.jsonl: no such file: correct its name
    """
    path = Path(file)
    if path.is_dir():
        raise IsADirectoryError(f"{file}: a directory: give the files in it, as {path / '*.jsonl'}")
    if not path.exists():
        raise FileNotFoundError(f"{file}: no such file: correct its name")
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"{file}: data ends with {known}, not with {path.suffix or 'nothing'!r}: convert or rename it")
    empty = True
    for line, fields in READERS[path.suffix](path):
        empty = False
        yield Record(fields, str(file), line)
    if empty:
        raise ValueError(f"{file}: there is nothing in it: give a file with data")


Numbered = Iterator[tuple[int, dict[str, Any]]]


def _txt(file: Path) -> Numbered:
    text = "".join(_lines(file)).replace("\r\n", "\n")
    if text.strip():
        yield 1, {"text": text}


def _jsonl(file: Path) -> Numbered:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            at = f"{file}:{number}: no JSON at column {error.colno} ({error.msg})"
            raise ValueError(f'{at}: each line is one object, as {{"text": ...}}; correct it') from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
            raise ValueError(f"{file}:{number}: JSON that cannot be read ({error}): correct it") from None
        if not isinstance(fields, dict):
            what = f"{file}:{number}: {kind_of_value(fields)}, not an object"
            raise ValueError(f'{what}: write each line as an object, as {{"text": ...}}')
        yield number, fields


def _csv(file: Path) -> Numbered:
    limit = csv.field_size_limit(LONGEST)
    try:
        rows = csv.reader(_lines(file), strict=True)
        header, end = None, 0
        while True:
            start = end + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"{file}:{start}: no row of a csv ({error}): correct its quotes and line ends"
                ) from None
            end = rows.line_num
            if header is None:
                header = _header(row, file) if row else None
            elif row:  # an empty line is none
                if len(row) != len(header):
                    names = ", ".join(header)
                    count = f"{len(row)} fields, and the first row names {len(header)} ({names})"
                    raise ValueError(
                        f"{file}:{start}: {count}: quote fields that hold a comma, a quote or a line break"
                    )
                yield start, dict(zip(header, row, strict=True))
    finally:
        csv.field_size_limit(limit)


def _header(row: list[str], file: Path) -> list[str]:
    names = [name.strip() for name in row]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file}:1: the first row names {twice[0]!r} more than once: rename one of them")
    for mark in ("\t", ";"):
        if len(names) == 1 and mark in names[0]:
            raise ValueError(f"{file}:1: its fields are separated by {mark!r}: save it with commas")
    return names


def _parquet(file: Path) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        message = f"{file}: reading it needs pyarrow: pip install 'lora-jax[parquet]'"
        raise ModuleNotFoundError(message) from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, {name: _without_nulls(value) for name, value in fields.items()}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).split("\n")[0]
        place = f"{file}: after row {number}: " if number else f"{file}: "
        raise ValueError(f"{place}no parquet that can be read ({reason}): write it anew") from None


def _without_nulls(value: Any) -> Any:
    """All structs of a column have all fields, those not given as null; a template is to see none of these."""
    if isinstance(value, dict):
        return {name: _without_nulls(x) for name, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


READERS = {".jsonl": _jsonl, ".txt": _txt, ".csv": _csv, ".parquet": _parquet}


def _lines(file: Path) -> Iterator[str]:
    """Its lines, with what ends them: a line feed alone, as text may hold other separators.

    Raises:
      ValueError: One is no UTF-8.
    """
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if number == 1:
                line = line.removeprefix(BOM)
            remedy = "it is another encoding, or no text: save it as UTF-8"
            if b"\0" in line:
                raise ValueError(f"{file}:{number}: a NUL byte: {remedy}")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {line[error.start]:#04x} at column {error.start + 1}"
                raise ValueError(f"{file}:{number}: no UTF-8 ({byte}): {remedy}") from None


def kind_of_value(value: Any) -> str:
    """What a value of JSON is, in JSON's words.

    >>> kind_of_value([1]), kind_of_value(None), kind_of_value(2.0)
    ('a list', 'null', 'a number')
    """
    names = {str: "a string", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")

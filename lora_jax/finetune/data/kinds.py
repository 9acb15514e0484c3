"""Kinds: which columns of a record are meant, what they must hold, and what it thus is; one run has one kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.finetune.data.sources import Record, kind_of_value

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can write and UTF-8 cannot


class Kind(NamedTuple):
    """What records are.

    Attributes:
      name: "text", "completion", "chat" or "classification".
      columns: What each of them has.
      optional: What all of them or none may have.
      beside: What any of them may have besides.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


TEMPLATED = ("tools", "documents", "chat_template_kwargs")  # what a chat template may be given besides
KINDS = {
    "lm": (
        Kind("text", ("text",)),
        Kind("completion", ("prompt", "completion"), beside=TEMPLATED),
        Kind("chat", ("messages",), beside=TEMPLATED),
    ),
    "classification": (Kind("classification", ("text", "label"), ("text_pair",)),),
}


def typed(records: Iterable[Record], task: str, columns: Mapping[str, str]) -> tuple[Kind, list[Record]]:
    """Records with the columns of their kind alone, under the names that `KINDS` has for them.

    Args:
      records: As of `sources.read`.
      task: "lm" or "classification".
      columns: Which column of the files is meant by a name of `KINDS`: {"text": "body"}.

    Returns:
      The kind of all of them, and the records.

    Raises:
      ValueError: A record is of no kind, of several, or of another than the first; or it holds what it may not.

    >>> typed([Record({"body": "Hi.", "id": 3}, "a.jsonl", 1)], "lm", {"text": "body"})[1]
    [Record(fields={'text': 'Hi.'}, file='a.jsonl', line=1)]
    >>> typed([Record({"body": "Hi.", "stars": 5}, "a.jsonl", 1)], "classification", {"text": "body"})
    Traceback (most recent call last):
    ValueError: a.jsonl:1: it has body and stars, and needs body and label: name those meant, as --columns label=stars
    """
    known = sorted({name for kind in KINDS[task] for name in (*kind.columns, *kind.optional, *kind.beside)})
    if unknown := sorted({*columns} - {*known}):
        raise ValueError(f"--columns {unknown[0]}=...: no name for {task}: known are {', '.join(known)}")
    kind, names, first, found = None, {}, "", []
    for record in records:
        if kind is None:
            kind = _kind(record, task, columns)
            have = [name for name in kind.optional if columns.get(name, name) in record.fields]
            if absent := [name for name in kind.optional if name in columns and name not in have]:
                kind = kind._replace(columns=(*kind.columns, *absent))  # asked for, so an error below
            names = {name: columns.get(name, name) for name in (*kind.columns, *have)}
            first = record.where
        lacks = [column for column in names.values() if column not in record.fields]
        others = [name for name in kind.optional if name not in names and name in record.fields]
        if lacks or others:
            what = f"{record.where}: it has {_listed(record.fields)}, and {first} has {_listed(names.values())}"
            raise ValueError(f"{what}: the records of a run are of one kind; correct it or leave it out")
        fields = {name: _checked(record, name, column) for name, column in names.items()}
        for name in kind.beside:
            if (value := record.fields.get(columns.get(name, name))) is not None:
                fields[name] = _parsed(record, columns.get(name, name), value)
        if kind.name == "completion" and isinstance(fields["prompt"], str) != isinstance(fields["completion"], str):
            raise ValueError(f"{record.where}: prompt and completion differ: make both strings, or lists of messages")
        found.append(Record(fields, record.file, record.line))
    if kind is None:
        raise ValueError("there are no records: give --data")
    return kind, found


def is_chat(fields: Mapping[str, Any]) -> bool:
    """Whether a record is rendered by a chat template."""
    return not isinstance(fields.get("messages", fields.get("prompt", "")), str)


def _kind(record: Record, task: str, columns: Mapping[str, str]) -> Kind:
    """The kind of the first record; where columns are named, one that has them."""
    kinds = [kind for kind in KINDS[task] if {*columns} <= {*kind.columns, *kind.optional, *kind.beside}]
    fit = [kind for kind in kinds if {columns.get(name, name) for name in kind.columns} <= record.fields.keys()]
    if len(fit) == 1:
        return fit[0]
    if fit:
        several, name = " and ".join(_listed(kind.columns) for kind in fit), fit[0].columns[0]
        raise ValueError(f"{record.where}: it has {several}: name what is meant, as --columns {name}={name}")
    kinds = kinds or [*KINDS[task]]
    needed = ", or ".join(_listed(columns.get(name, name) for name in kind.columns) for kind in kinds)
    absent = [name for name in kinds[0].columns if columns.get(name, name) not in record.fields]
    unused = [name for name in record.fields if name not in (*columns.values(), *kinds[0].columns)]
    remedy = f"name those meant, as --columns {absent[0]}={unused[0] if unused else 'NAME'}"
    raise ValueError(f"{record.where}: it has {_listed(record.fields) or 'no columns'}, and needs {needed}: {remedy}")


def _checked(record: Record, name: str, column: str) -> Any:
    value = record.fields[column]
    if name == "messages":
        return _messages(record, column, value, answered=True)
    if name in ("prompt", "completion") and isinstance(value, list):
        return _messages(record, column, value, answered=name == "completion")
    if name == "label":
        return _label(record, column, value)
    return _string(record, column, value, empty=name == "prompt")


def _string(record: Record, column: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        what = f"{record.where}: {column} is {kind_of_value(value)}, not a string"
        raise ValueError(f"{what}: correct it, or leave the record out")
    if not value and not empty:
        raise ValueError(f"{record.where}: {column} is empty: fill it in, or leave the record out")
    if not value.isascii() and SURROGATE.search(value):
        raise ValueError(f"{record.where}: {column} has half a surrogate pair, \\ud800 or the like: write it whole")
    return value


def _label(record: Record, column: str, value: Any) -> int | str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{record.where}: {column} is {value}, as where there is none: leave such records out")
        return value
    if not isinstance(value, str):
        what = f"{record.where}: {column} is {kind_of_value(value)}"
        raise ValueError(f"{what}: a label is a whole number or a string; correct it")
    return _string(record, column, value)


def _messages(record: Record, column: str, value: Any, answered: bool) -> list[dict[str, Any]]:
    example = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(value, list):
        what = f"{record.where}: {column} is {kind_of_value(value)}, not a list"
        raise ValueError(f"{what}: write {example}, which .jsonl and .parquet can hold")
    for number, message in enumerate(value, 1):
        place = f"{column}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{record.where}: {place} is {kind_of_value(message)}, not an object: write {example}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f'{record.where}: {place} has no "role": write {example}')
        content = message.get("content")
        if isinstance(content, str):
            _string(record, f"the content of {place}", content, empty=True)
        elif isinstance(content, list):
            for part in content:
                text = part.get("text") if isinstance(part, dict) else part
                _string(record, f"a part of the content of {place}, which is to be text,", text, empty=True)
        elif content is not None or "tool_calls" not in message:
            what = "no content" if "content" not in message else f"content that is {kind_of_value(content)}"
            raise ValueError(f"{record.where}: {place} has {what}, not a string: correct it")
    if answered and not any(message["role"] == "assistant" for message in value):
        what = f"{record.where}: {column} has no message of the assistant, and thus no token to learn"
        raise ValueError(f'{what}: add one with "role": "assistant", or leave the record out')
    return value


def _parsed(record: Record, column: str, value: Any) -> Any:
    """A value, or one that was written as JSON in a string, as columns of one type have it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{record.where}: {column} is a string, and no JSON ({error}): correct it") from None


def _listed(names: Iterable[str]) -> str:
    """
    >>> _listed(["prompt", "completion"])
    'prompt and completion'
    """
    return " and ".join(names)

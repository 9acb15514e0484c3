"""Values: what a field of `Settings` may hold, made of a flag's word or of an entry of a file."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lora_jax.finetune.settings import Settings

FIELDS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}  # YAML 1.1's
NOTHING = ("", "~", "null", "none", "None", "Null", "NULL")


class Given(NamedTuple):
    """What was said of a field.

    Attributes:
      value: A word as it was written, a list of them, words by name, or a number, bool or None of TOML's.
      where: By which flag, or in which file and line.
      quoted: Whether the word stood in quotes, so that it is no number.
    """

    value: Any
    where: str
    quoted: bool = False


def value(name: str, given: Given) -> Any:
    """What a field is to hold.

    Raises:
      ValueError: It may not hold that; the message has where it was said, what it is and what it may be.

    >>> value("learning_rate", Given("1e-4", "run.yaml:3")), value("data", Given("a.txt", "--data"))
    (0.0001, ('a.txt',))
    >>> value("rank", Given("eight", "--rank"))
    Traceback (most recent call last):
    ValueError: --rank: rank is 'eight', and it is a whole number, 1 or more
    """
    field = FIELDS[name]
    kind, _, rest = str(field.type).partition(" | ")
    said = given.value
    if rest and (said is None or (isinstance(said, str) and said in NOTHING)):
        return None
    if said == "" and kind.startswith(("tuple", "dict")):  # a key of YAML's with nothing after it
        said = []
    try:
        found = _PARSERS[kind.partition("[")[0]](said, given.quoted)
    except (TypeError, ValueError, AttributeError):
        found = None
    if found is None or not allowed(field, found):
        shown = repr(said) if isinstance(said, str) or said is None else f"{said} ({type(said).__name__})"
        raise ValueError(f"{given.where}: {name} is {shown}, and it is {means(field)}")
    return found


def means(field: dataclasses.Field[Any]) -> str:
    """What a field may hold, in words.

    >>> means(FIELDS["schedule"]), means(FIELDS["rank"])
    ('cosine, linear or constant', 'a whole number, 1 or more')
    """
    meta = field.metadata
    if "choices" in meta:
        return " or ".join(filter(None, (", ".join(meta["choices"][:-1]), meta["choices"][-1])))
    kind = str(field.type).partition(" | ")[0].partition("[")[0]
    limits = [f"{meta['least']} or more"] if "least" in meta else []
    limits += [f"{word} {meta[word]}" for word in ("above", "below") if word in meta]
    if "most" in meta:
        limits.append(f"{meta['most']} at most")
    return ", ".join(filter(None, (_MEANS[kind], " and ".join(limits))))


def allowed(field: dataclasses.Field[Any], found: Any) -> bool:
    """Whether a value of the right type is one that the field may hold."""
    meta = field.metadata
    if "choices" in meta and found not in meta["choices"]:
        return False
    return not (
        ("least" in meta and found < meta["least"])
        or ("most" in meta and found > meta["most"])
        or ("above" in meta and found <= meta["above"])
        or ("below" in meta and found >= meta["below"])
    )


def unknown(name: str, where: str) -> ValueError:
    """The error of a field that there is not.

    >>> unknown("learning-rat", "run.yaml:2")
    ValueError("run.yaml:2: 'learning-rat' is no setting: did you mean learning_rate?")
    """
    close = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1)
    hint = f"did you mean {' or '.join(close)}?" if close else "lora-jax train --help lists them"
    return ValueError(f"{where}: {name!r} is no setting: {hint}")


def settings(given: Mapping[str, Given]) -> Settings:
    """Settings of what was said of some fields; the others have their defaults.

    Raises:
      ValueError: There is no such field, or it may not hold that.
    """
    for name, one in given.items():
        if name not in FIELDS:
            raise unknown(name, one.where)
    return Settings(**{name: value(name, one) for name, one in given.items()})


def _text(said: Any, quoted: bool) -> str | None:
    if isinstance(said, datetime.date):  # TOML's, as a day without quotes
        return said.isoformat()
    return said if isinstance(said, str) else None


def _whole(said: Any, quoted: bool) -> int | None:
    if quoted or isinstance(said, bool | float):
        return None
    return said if isinstance(said, int) else int(said) if said.lstrip("+-").isdecimal() else None


def _number(said: Any, quoted: bool) -> float | None:
    if quoted or isinstance(said, bool):
        return None
    found = float(said)
    return found if math.isfinite(found) and "_" not in str(said) else None


def _truth(said: Any, quoted: bool) -> bool | None:
    return said if isinstance(said, bool) else None if quoted else WORDS.get(said.lower())


def _several(said: Any, quoted: bool) -> tuple[str, ...] | None:
    words = [said] if isinstance(said, str) else said
    return tuple(words) if isinstance(words, list | tuple) and all(isinstance(word, str) for word in words) else None


def _named(said: Any, quoted: bool) -> dict[str, str] | None:
    if isinstance(said, list):  # of flags, NAME=VALUE
        parts = [word.partition("=") for word in said]
        if not all(name and equals for name, equals, _ in parts) or len({name for name, _, _ in parts}) < len(parts):
            return None
        said = {name: rest for name, _, rest in parts}
    return {str(name): _shown(x) for name, x in said.items()} if isinstance(said, Mapping) else None


def _shown(x: Any) -> str:
    if isinstance(x, list | dict):
        raise TypeError
    return x if isinstance(x, str) else str(x).lower() if isinstance(x, bool) else str(x)


_PARSERS: dict[str, Callable[[Any, bool], Any]] = {
    "str": _text,
    "int": _whole,
    "float": _number,
    "bool": _truth,
    "tuple": _several,
    "dict": _named,
}
_MEANS = {
    "str": "a word",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a word, or a list of them",
    "dict": "names with values: NAME=VALUE in a flag, each name once, a mapping in a file",
}

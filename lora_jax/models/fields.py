"""What the fields of a config may be, by their types, and what a config.json must say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number of 1 or more"),
    "float": ((int, float), "a number above 0"),
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
}


def check_fields(config: Any) -> None:
    """Check that the fields of a dataclass are of their types, as a file's may not be, and that numbers are above 0.

    Raises:
      ValueError: One is not.

    >>> from lora_jax.models.llama import Config
    >>> Config(64, "16", 2, 4, 32)
    Traceback (most recent call last):
    ValueError: Config: hidden_size is '16': make it a whole number of 1 or more
    """
    for field in dataclasses.fields(config):
        name, _, optional = str(field.type).partition(" | ")
        value = getattr(config, field.name)
        if name not in KINDS or (optional and value is None):
            continue
        kind, words = KINDS[name]
        number = isinstance(value, (int, float)) and kind is not bool
        if not isinstance(value, kind) or (number and (isinstance(value, bool) or not value > 0)):
            raise ValueError(f"{type(config).__name__}: {field.name} is {value!r}: make it {words}")


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any], what: str) -> None:
    """Check that a config.json has these values, or leaves them out.

    Raises:
      ValueError: It asks for something else.

    >>> check_fixed({"is_decoder": True}, {"is_decoder": False}, "encoder")
    Traceback (most recent call last):
    ValueError: config.json: is_decoder is True, this encoder has False: load a model with that
    """
    for field, value in fixed.items():
        got = config.get(field, value)
        if got != value and not (got is None and value is False):
            raise ValueError(f"config.json: {field} is {got!r}, this {what} has {value!r}: load a model with that")


def given(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of a dataclass's fields, but for those that are null.

    Raises:
      ValueError: It lacks a field that has no default.
    """
    fields = dataclasses.fields(kind)
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if absent := [name for name in needed if config.get(name) is None]:
        raise ValueError(f"config.json lacks {', '.join(absent)}: take the one that belongs to the weights")
    return {field.name: config[field.name] for field in fields if config.get(field.name) is not None}

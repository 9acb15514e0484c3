"""What the fields of a config may be, by their types."""

from __future__ import annotations

import dataclasses
from typing import Any

KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number of 1 or more"),
    "float": ((int, float), "a number above 0"),
    "bool": (bool, "true or false"),
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
        if not isinstance(value, kind) or (kind is not bool and not value > 0):
            raise ValueError(f"{type(config).__name__}: {field.name} is {value!r}: make it {words}")

"""Tokenizer: that of a model's directory, with the tokens that begin, end and pad."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tokenizers

from lora_jax.formats.huggingface.directory import CONFIG, read_json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer, and what the files beside it say.

    Attributes:
      fast: What encodes.
      eos: The token that ends a document; None where no file names one.
      pad: The token that fills rows up; its embedding is never seen.
      template: The chat template, in Jinja; None where there is none.
    """

    fast: tokenizers.Tokenizer
    eos: int | None
    pad: int
    template: str | None = None

    @classmethod
    def of(cls, directory: Path, vocab_size: int) -> Tokenizer:
        """Reads tokenizer.json and what is beside it.

        Raises:
          FileNotFoundError: There is no tokenizer.json.
          ValueError: It is none, or has tokens that the embedding of `vocab_size` rows lacks.
        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"'{file}' is missing: save the model's fast tokenizer beside its weights")
        try:
            fast = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises the bare Exception class, so nothing narrower catches it
            raise ValueError(f"'{file}' is no tokenizer ({error}): save the model's fast tokenizer anew") from error
        eos: Any = read_json(directory / CONFIG).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) else eos
        return cls(fast, eos, 0 if eos is None else eos)

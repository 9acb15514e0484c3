"""Tokenizer: that of a model's directory, with the tokens that begin, end and pad, and its chat templates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lora_jax.finetune.data import documents
from lora_jax.finetune.data.template import Template
from lora_jax.formats.huggingface.directory import CONFIG, read_json

TOKENIZER, TOKENIZER_CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION, JINJA, TEMPLATE = "generation_config.json", "chat_template.jinja", "chat_template.json"
# What a template may name.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer, and what the files beside it say.

    Attributes:
      fast: What encodes; it neither pads nor truncates, and its offsets say all characters of a token.
      vocab_size: How many tokens the model has.
      bos: The token that begins a text; None where no file names one.
      eos: The token that ends one; None where no file names one.
      pad: The token that fills rows up; its embedding is never seen.
      templates: Chat templates by name; "default" where there is but one.
      file: Where it is from.
    """

    fast: tokenizers.Tokenizer
    vocab_size: int
    bos: int | None
    eos: int | None
    pad: int
    templates: Mapping[str, Template]
    file: str

    @classmethod
    def of(
        cls, directory: str | Path, vocab_size: int, chat_template: str | Path | None = None, date: str | None = None
    ) -> Tokenizer:
        """Reads tokenizer.json and what is beside it.

        Args:
          directory: A model's.
          vocab_size: How many rows its embedding has.
          chat_template: A file in Jinja, instead of the directory's.
          date: As of `Template`.

        Raises:
          FileNotFoundError: There is no tokenizer.json, or no such template.
          ValueError: It is none, it has tokens that the embedding lacks, it lacks those that the files beside it name,
            or a template is no Jinja.
        """
        directory = Path(directory)
        fast = _fast(directory / TOKENIZER)
        file = directory / TOKENIZER
        vocabulary = fast.get_vocab(with_added_tokens=True)
        added = {token.content for token in fast.get_added_tokens_decoder().values()}
        largest = max(((number, token) for token, number in vocabulary.items() if token not in added), default=(0, ""))
        _fits(
            f"'{file}'", largest[1], largest[0], vocab_size
        )  # added ones may be of other modalities, never to come up
        beside = {name: _beside(directory / name) for name in (TOKENIZER_CONFIG, SPECIAL, CONFIG, GENERATION)}
        numbers = {
            name: _number(name, directory, beside, vocabulary, vocab_size)
            for name in ("bos_token", "eos_token", "pad_token")
        }
        bos, eos, pad = numbers.values()
        texts = {name: _text(beside[TOKENIZER_CONFIG].get(name) or beside[SPECIAL].get(name)) for name in NAMED}
        named = {name: fast.id_to_token(number) for name, number in numbers.items() if number is not None}
        variables: dict[str, Any] = {name: text for name, text in texts.items() if text} | named
        if more := beside[TOKENIZER_CONFIG].get("additional_special_tokens"):
            variables["additional_special_tokens"] = [_text(token) for token in more]
        special = tuple(token.content for token in fast.get_added_tokens_decoder().values() if token.special)
        sources = _templates(directory, beside[TOKENIZER_CONFIG], chat_template)
        templates = {
            name: Template(source, where, variables, special, date) for name, (where, source) in sources.items()
        }
        return cls(fast, vocab_size, bos, eos, (eos or 0) if pad is None else pad, templates, str(file))

    def encode(
        self, texts: Sequence[Any], where: Sequence[str], *, special: bool = True, truncate: int | None = None
    ) -> list[tokenizers.Encoding]:
        """Encodes texts, or pairs of texts, with offsets.

        Args:
          texts: Strings, or pairs of them.
          where: The place of each, for errors.
          special: Whether with the tokens that the tokenizer sets around a text.
          truncate: The most tokens, with those; of a pair, the longer text is shortened first. None: any number.

        Raises:
          ValueError: A token has no row in the embedding.
        """
        if truncate is not None:
            self.fast.enable_truncation(truncate)
        try:
            found = self.fast.encode_batch(texts, add_special_tokens=special)
        finally:
            self.fast.no_truncation()
        self.check([encoding.ids for encoding in found], where)
        return found

    def ids(self, texts: Sequence[str], where: Sequence[str]) -> list[np.ndarray]:
        """Tokens of texts, int32, with those that the tokenizer sets around a text; faster than `encode`."""
        short = [text for text in texts if len(text) <= documents.PART]
        encoded = iter(self.fast.encode_batch_fast(short))
        found = [
            np.array(next(encoded).ids, np.int32) if len(text) <= documents.PART else documents.encode(self.fast, text)
            for text in texts
        ]
        self.check(found, where)
        return found

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """Tokens as text, special ones too."""
        return self.fast.decode([int(i) for i in ids], skip_special_tokens=False)

    def check(self, ids: Sequence[Any], where: Sequence[str]) -> None:
        """Raises ValueError where a token has no row in the embedding."""
        for numbers, place in zip(ids, where, strict=True):
            if len(numbers) and (largest := int(np.max(numbers))) >= self.vocab_size:
                token = self.fast.id_to_token(largest)
                _fits(f"{place}: '{self.file}'", token, largest, self.vocab_size)

    def template(self, tools: bool = False) -> Template:
        """The chat template; the one for tools, where there are any and it has one.

        Raises:
          ValueError: There is none.
        """
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        directory, names = Path(self.file).parent, ", ".join(self.templates)
        what = f"chat templates called {names}, and none 'default'" if names else "no chat template"
        remedy = "give one as --chat-template FILE.jinja, which says how messages are written"
        raise ValueError(f"'{directory}' has {what}: {remedy}")


def _fast(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is missing: save the model's fast tokenizer beside its weights")
    try:
        content = json.loads(file.read_bytes())
        content["padding"] = content["truncation"] = None
        _keep_spaces(content.get("post_processor"))
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # tokenizers raises the bare Exception class, so nothing narrower catches it
        raise ValueError(f"'{file}' is no tokenizer ({error}): save the model's fast tokenizer anew") from error


def _keep_spaces(processor: Any) -> None:
    """Has offsets include the spaces of a token, which some tokenizers trim off; its ids stay."""
    for part in (processor or {}).get("processors", [processor]):
        if part and "trim_offsets" in part:
            part["trim_offsets"] = False


def _fits(whose: str, token: str | None, number: int, vocab_size: int) -> None:
    if number >= vocab_size:
        raise ValueError(
            f"{whose} gives {token!r} the id {number}, and the model's embedding has {vocab_size} rows: take the "
            "tokenizer that belongs to the weights"
        )


def _beside(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _number(
    name: str, directory: Path, beside: Mapping[str, Mapping[str, Any]], vocabulary: Mapping[str, int], vocab_size: int
) -> int | None:
    """The id of a special token, by the first file that names it."""
    known = {number: token for token, number in vocabulary.items()}
    remedy = "take the tokenizer that belongs to the weights, or correct the name"
    for file in (TOKENIZER_CONFIG, SPECIAL):
        if token := _text(beside[file].get(name)):
            if token not in vocabulary:
                raise ValueError(f"'{directory / file}': {name} is {token!r}, which {TOKENIZER} lacks: {remedy}")
            _fits(f"'{directory / TOKENIZER}'", token, vocabulary[token], vocab_size)
            return vocabulary[token]
    for file in (CONFIG, GENERATION):
        number = beside[file].get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0:
            if number not in known:
                raise ValueError(f"'{directory / file}': {name}_id is {number}, which {TOKENIZER} lacks: {remedy}")
            _fits(f"'{directory / TOKENIZER}'", known[number], number, vocab_size)
            return number
    return None


def _templates(directory: Path, config: Mapping[str, Any], given: str | Path | None) -> dict[str, tuple[str, str]]:
    """Where each template is from, and its source, by name."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"{given}: no such file: correct --chat-template")
        return {"default": (str(given), _jinja(Path(given)))}
    if (file := directory / JINJA).is_file():
        return {"default": (str(file), _jinja(file))}
    file, found = directory / TOKENIZER_CONFIG, config.get("chat_template")
    if found is None:
        file = directory / TEMPLATE
        found = _beside(file).get("chat_template")
    if isinstance(found, str):
        return {"default": (str(file), found)}
    try:
        return {entry["name"]: (str(file), entry["template"]) for entry in found or []}
    except (TypeError, KeyError):
        what = f"'{file}': chat_template is neither a template nor a list of named ones"
        raise ValueError(f"{what}: correct it, or give one as --chat-template FILE.jinja") from None


def _jinja(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: no UTF-8 ({error.reason}): give a template in Jinja") from None

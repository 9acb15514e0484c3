"""Prompts: texts or conversations from the command line or a file, as tokens that an answer goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.finetune.sources import read
from lora_jax.finetune.tokenizer import Tokenizer
from lora_jax.formats.huggingface.directory import CONFIG, read_json

GENERATION = "generation_config.json"


class Prompt(NamedTuple):
    """What is to be answered.

    Attributes:
      text: As it is shown.
      messages: The conversation, where it is one.
      where: Where it is from, for errors.
    """

    text: str
    messages: tuple[Any, ...] | None
    where: str


def gather(texts: Iterable[str], files: Iterable[str | Path], chat: bool) -> list[Prompt]:
    """The prompts of a command line.

    Args:
      texts: From the command line.
      files: A .txt file has one on each line. Other files of data have them as "prompt" or "text", or as "messages"
        with an assistant's last turn left out.
      chat: Whether texts are what a user says in a conversation.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A file cannot be read, or has no prompts; or there are none at all.

    >>> gather(["Hello"], [], chat=True)[0].messages
    ({'role': 'user', 'content': 'Hello'},)
    """
    found = [_prompt({"prompt": text}, f"--prompt {i}", chat) for i, text in enumerate(texts, 1)]
    for file in map(Path, files):
        if file.suffix == ".txt":
            own = _lines(file, chat)
        else:
            own = [_prompt(record.fields, record.where, chat) for record in read(file)]
        if not own:
            raise ValueError(f"{file}: no prompt is in it: write one on each line")
        found += own
    if not found:
        raise ValueError("no prompts: give --prompt TEXT, once or more, or --prompts FILE")
    return found


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The tokens of each prompt, int32, as training has them before what it learns to write.

    Texts begin with what the tokenizer sets before a text, and have nothing behind them that would end it.
    Conversations are written by the tokenizer's own template, with what asks for an answer.

    Raises:
      ValueError: A prompt has no tokens; or there is no template, or it refuses a conversation.
    """
    found = []
    for prompt in prompts:
        if prompt.messages is None:
            ids = tokenizer.fast.encode(prompt.text).ids
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos else ids
        else:
            text = tokenizer.template().render(prompt.messages, prompt.where, prompt=True)
            ids = tokenizer.fast.encode(text, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f"{prompt.where}: a prompt without a token: write something to go on from")
        found.append(np.array(ids, np.int32))
    return found


def padded(ids: Sequence[np.ndarray], pad: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in rows of one length, and which of them count: int32 [B, L] and bool [B, L].

    >>> padded([np.array([5]), np.array([6, 7])], 0, left=True)[0].tolist()
    [[0, 5], [6, 7]]
    """
    length = max(map(len, ids))
    rows, mask = np.full((len(ids), length), pad, np.int32), np.zeros((len(ids), length), bool)
    for i, own in enumerate(ids):
        where = slice(length - len(own), length) if left else slice(len(own))
        rows[i, where], mask[i, where] = own, True
    return rows, mask


def ends(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, by the files of a model's directory and its tokenizer."""
    found = set() if tokenizer.eos is None else {tokenizer.eos}
    for name in (CONFIG, GENERATION):
        given = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        found |= {end for end in (given if isinstance(given, list) else [given]) if isinstance(end, int)}
    return tuple(sorted(found))


def _lines(file: Path, chat: bool) -> list[Prompt]:
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' is no file: correct --prompts")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is no text in UTF-8 ({error.reason} at byte {error.start}): convert it") from error
    return [_prompt({"prompt": line}, f"{file}:{i}", chat) for i, line in enumerate(lines, 1) if line.strip()]


def _prompt(fields: Any, where: str, chat: bool) -> Prompt:
    text = fields.get("prompt", fields.get("text"))
    messages = fields.get("messages")
    if isinstance(text, str):
        return Prompt(text, ({"role": "user", "content": text},) if chat else None, where)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: neither a prompt, a text nor messages are in it: name one of these fields so")
    if not chat:
        raise ValueError(f"{where}: messages are a conversation: give --chat, too")
    while messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{where}: nobody asks anything in these messages: give a user's at least")
    return Prompt(str(messages[-1].get("content")), tuple(messages), where)

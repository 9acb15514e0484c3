"""Prompts: texts or conversations, of the command line or a file, as the tokens that an answer goes on from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.finetune.data.kinds import TEMPLATED, is_chat
from lora_jax.finetune.data.sources import Record, read
from lora_jax.finetune.data.tokenizer import GENERATION, Tokenizer
from lora_jax.formats.huggingface.directory import CONFIG, read_json


class Prompt(NamedTuple):
    """What is to be answered, or to be classified.

    Attributes:
      text: As it is shown.
      where: Where it is from, for errors.
      messages: The conversation, where it is one.
      pair: Of two texts to be classified together, the second.
      options: What a chat template is given besides.
    """

    text: str
    where: str
    messages: tuple[Any, ...] | None = None
    pair: str | None = None
    options: Mapping[str, Any] = {}


class Tokens(NamedTuple):
    """A prompt's tokens, int32 [n], and of a pair which text each is of; else None."""

    ids: np.ndarray
    types: np.ndarray | None = None


def gather(texts: Iterable[str], files: Iterable[str | Path], chat: bool = False) -> list[Prompt]:
    """The prompts of a command line.

    Args:
      texts: From the command line.
      files: A .txt file has one on each line. Other files of data have them as "prompt" or "text", or as "messages",
        of which the assistant's last is left out.
      chat: Whether texts are what a user says in a conversation.

    Raises:
      OSError: A file is missing or cannot be read.
      ValueError: A file is not what its name says, or a record has no prompt; or there are none at all.

    >>> gather(["Hello"], [], chat=True)[0].messages
    ({'role': 'user', 'content': 'Hello'},)
    """
    found = [_prompt(Record({"prompt": text}, f"--prompt {text!r:.40}", 0), chat) for text in texts]
    for file in files:
        records = [*read(file)]
        if Path(file).suffix == ".txt":
            lines = enumerate(records[0].fields["text"].splitlines(), 1)
            records = [Record({"prompt": line}, str(file), number) for number, line in lines if line.strip()]
        found += [_prompt(record, chat) for record in records]
    if not found:
        raise ValueError("there are no prompts: give --prompt TEXT, once or more, or --prompts FILE")
    return found


def encode(prompts: Sequence[Prompt], tokenizer: Tokenizer, *, classify: bool = False) -> list[Tokens]:
    """The tokens of each prompt, as training has them before what it learns to write, or to classify.

    Texts begin with what the tokenizer sets before a text; what it sets behind one stays if that is to be classified.
    Conversations are written by the chat template, with what asks for an answer.

    Raises:
      ValueError: A prompt has no tokens, or one that the model does not know; there is no template, or it refuses a
        conversation; or one is to be classified.
    """
    found = []
    for prompt in prompts:
        if classify and prompt.messages is not None:
            raise ValueError(f"{prompt.where}: a classifier reads texts, and this is a conversation: leave --chat out")
        if prompt.messages is None:
            text: Any = prompt.text if prompt.pair is None else (prompt.text, prompt.pair)
        else:
            template = tokenizer.template("tools" in prompt.options)
            text = template.render(prompt.messages, prompt.where, prompt=True, **prompt.options)
        (encoding,) = tokenizer.encode([text], [prompt.where], special=prompt.messages is None)
        ids, types = (np.array(x, np.int32) for x in (encoding.ids, encoding.type_ids))
        if not classify and len(ids) and prompt.messages is None and ids[-1] == tokenizer.eos:
            ids = ids[:-1]
        if not len(ids):
            raise ValueError(f"{prompt.where}: the tokenizer makes no token of it: write something to go on from")
        found.append(Tokens(ids, types if prompt.pair is not None else None))
    return found


def padded(rows: Sequence[np.ndarray], pad: int, length: int, *, left: bool) -> np.ndarray:
    """Rows of one length, int32 [B, length].

    >>> padded([np.array([5]), np.array([6, 7])], 0, 3, left=True).tolist()
    [[0, 0, 5], [0, 6, 7]]
    """
    found = np.full((len(rows), length), pad, np.int32)
    for row, own in zip(found, rows, strict=True):
        row[length - len(own) if left else 0 :][: len(own)] = own
    return found


def ends(directory: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, by the files of a model's directory and its tokenizer."""
    found = set() if tokenizer.eos is None else {tokenizer.eos}
    for name in (CONFIG, GENERATION):
        given = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
        found |= {end for end in (given if isinstance(given, list) else [given]) if isinstance(end, int)}
    return tuple(sorted(found))


def _prompt(record: Record, chat: bool) -> Prompt:
    fields, where = record.fields, record.where if record.line else record.file
    if "messages" in fields or ("prompt" in fields and is_chat(fields)):
        messages = fields.get("messages", fields.get("prompt"))
        if not isinstance(messages, list) or not all(isinstance(x, dict) and "role" in x for x in messages):
            raise ValueError(f'{where}: messages are a list of objects such as {{"role": "user", "content": "..."}}')
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"{where}: nobody but the assistant says anything: give a user's message")
        options = {name: fields[name] for name in TEMPLATED[:2] if name in fields}
        options |= fields.get("chat_template_kwargs") or {}
        return Prompt(str(messages[-1].get("content")), where, tuple(messages), None, options)
    text, pair = fields.get("prompt", fields.get("text")), fields.get("text_pair")
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise ValueError(f"{where}: it has {' and '.join(fields)}, and needs a prompt, a text or messages: name it so")
    messages = ({"role": "user", "content": text},) if chat else None
    return Prompt(text, where, messages, None if chat else pair)

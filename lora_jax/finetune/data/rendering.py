"""Rendering: a record becomes tokens, and which of them are to be predicted and count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from lora_jax.finetune.data import chat
from lora_jax.finetune.data.kinds import Kind, is_chat
from lora_jax.finetune.data.sources import Record
from lora_jax.finetune.data.template import Spans
from lora_jax.finetune.data.tokenizer import Tokenizer

TOGETHER = 1 << 21  # characters that are encoded at a time, by all cores: a hundred megabytes or so of their tokens


class Example(NamedTuple):
    """One example.

    Attributes:
      ids: Its tokens, int32 [n].
      mask: Which of them the loss predicts, bool [n]; never the first, which has none before it. Of an example to
        classify, none.
      where: The file and the line.
      label: Its class, where it has one.
      types: Which of two texts each token is of, int8 [n], where it has two.
      cut: Whether it was longer.
    """

    ids: np.ndarray
    mask: np.ndarray
    where: str
    label: int | str | None = None
    types: np.ndarray | None = None
    cut: bool = False


def render(
    kind: Kind, records: Sequence[Record], tokenizer: Tokenizer, truncate: int | None = None
) -> Iterator[Example]:
    """An example of each record, in their order.

    - Text: all tokens count, and the one that ends a document, which is set after it.
    - Prompt and completion are encoded as one text, as a model meets it. A token counts if any of its characters are
      the completion's, and the one that ends it, which is set after it.
    - Messages are rendered by the chat template. The assistant's turns count, and what ends each.
    - What is to be classified is encoded with the tokens that the tokenizer sets around it.

    Args:
      kind: What they are.
      records: As of `kinds.typed`.
      tokenizer: Encodes them.
      truncate: The most tokens of what is to be classified, which so keeps those that are set around it.

    Raises:
      ValueError: A token has no row in the embedding, a template refuses a record, or nothing counts.
    """
    start = size = 0
    for end, record in enumerate(records, 1):
        size += sum(len(str(value)) for value in record.fields.values())
        if size >= TOGETHER or end == len(records):
            part = records[start:end]
            if kind.name == "classification":
                yield from _classified(part, tokenizer, truncate)
            else:
                yield from (_texts if kind.name == "text" else _answers)(part, tokenizer)
            start, size = end, 0


def _texts(records: Sequence[Record], tokenizer: Tokenizer) -> Iterator[Example]:
    found = tokenizer.ids([record.fields["text"] for record in records], [record.where for record in records])
    for record, ids in zip(records, found, strict=True):
        ids = _ended(ids, tokenizer)
        yield _counted(ids, np.ones(len(ids), bool), record)


def _answers(records: Sequence[Record], tokenizer: Tokenizer) -> Iterator[Example]:
    """Of prompts and completions, and of chats: those characters count that are in spans."""
    chats = [is_chat(record.fields) for record in records]
    texts = [_chat(record, tokenizer) if is_chat(record.fields) else _joined(record) for record in records]
    where, found = [record.where for record in records], {}
    for one in {*chats}:  # what begins and ends a chat is in its template
        places = [i for i, x in enumerate(chats) if x == one]
        encodings = tokenizer.encode([texts[i][0] for i in places], [where[i] for i in places], special=not one)
        found |= dict(zip(places, encodings, strict=True))
    for i, record in enumerate(records):
        ids, mask = np.array(found[i].ids, np.int32), _inside(found[i], texts[i][1])
        if not chats[i]:
            mask[-1:] |= ids[-1:] == tokenizer.eos  # as some tokenizers set it themselves
            ids = _ended(ids, tokenizer)
            mask = np.pad(mask, (0, len(ids) - len(mask)), constant_values=True)
        yield _counted(ids, mask, record)


def _classified(records: Sequence[Record], tokenizer: Tokenizer, truncate: int | None) -> Iterator[Example]:
    paired = "text_pair" in records[0].fields
    texts: list[Any] = [record.fields["text"] for record in records]
    if paired:
        texts = [(text, record.fields["text_pair"]) for text, record in zip(texts, records, strict=True)]
    where = [record.where for record in records]
    for record, encoding in zip(records, tokenizer.encode(texts, where, truncate=truncate), strict=True):
        ids = np.array(encoding.ids, np.int32)
        if all(encoding.special_tokens_mask):
            what = f"{record.where}: no token of it is left of a row of {truncate}: raise --length"
            if not encoding.overflowing:
                what = f"{record.where}: the tokenizer makes no token of it: leave the record out"
            raise ValueError(what)
        types = np.array(encoding.type_ids, np.int8) if paired else None
        yield Example(
            ids, np.zeros(len(ids), bool), record.where, record.fields["label"], types, bool(encoding.overflowing)
        )


def _joined(record: Record) -> tuple[str, Spans]:
    prompt, completion = record.fields["prompt"], record.fields["completion"]
    return prompt + completion, [(len(prompt), len(prompt) + len(completion))]


def _chat(record: Record, tokenizer: Tokenizer) -> tuple[str, Spans]:
    fields = record.fields
    given = {name: fields[name] for name in ("tools", "documents") if name in fields}
    given |= fields.get("chat_template_kwargs", {})
    prompt = fields.get("prompt", [])
    messages = [*prompt, *fields["completion"]] if "completion" in fields else fields["messages"]
    return chat.spans(tokenizer.template("tools" in given), messages, record.where, len(prompt), **given)


def _inside(encoding: tokenizers.Encoding, spans: Spans) -> np.ndarray:
    """Which tokens have a character in a span; one without characters, which a tokenizer sets between, if it is there.

    Tokens that the tokenizer sets around a text are of no place in it.
    """
    bounds = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    first, last = bounds[:, 0], np.maximum(bounds[:, 1], bounds[:, 0] + 1)
    mask = np.zeros(len(bounds), bool)
    for start, end in spans:
        if start < end:
            mask |= (first < end) & (last > start)
    return mask & ~np.array(encoding.special_tokens_mask, bool)


def _ended(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """With the token that ends a document, once."""
    if tokenizer.eos is None or (len(ids) and ids[-1] == tokenizer.eos):
        return ids
    return np.append(ids, np.int32(tokenizer.eos))


def _counted(ids: np.ndarray, mask: np.ndarray, record: Record) -> Example:
    mask[:1] = False
    if not mask.any():
        what = f"{record.where}: none of its {len(ids)} tokens counts, as none of them is to be predicted"
        raise ValueError(f"{what}: a token counts that has others before it; fill the record in, or leave it out")
    return Example(ids, mask, record.where)

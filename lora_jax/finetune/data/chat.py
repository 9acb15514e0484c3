"""Chat: a tokenizer's own template, and which characters of what it renders are the assistant's turns.

A template says neither where a turn begins nor where it ends, unless it has `{% generation %}` blocks. Otherwise both
are found by rendering again, as each of these differs from the whole in one known way:

- with a mark in place of a turn's content: what is before the mark, and after it;
- what precedes the turn, with the generation prompt: where it ends, the answer begins;
- the turn as the last one, and with another after it: what both have after the mark is what ends a turn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.finetune.data.template import Message, Spans, Template

MARK = "\ufdd0"  # Unicode keeps this for use inside of programs


def spans(
    template: Template, messages: Sequence[Message], where: str, first: int = 0, **options: Any
) -> tuple[str, Spans]:
    """The text of a conversation, and the characters of it that the assistant writes: each turn, and what ends it.

    Args:
      template: How it is written.
      messages: As in `Template.render`, and so are `where` and `options`.
      where: See `messages`.
      first: The message from which on turns count.
      **options: See `messages`.

    Raises:
      ValueError: The template refuses the messages, or where the turns are cannot be told.

    >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> text, found = spans(Template(source, "chat.jinja", {}), chat, "data.jsonl:1")
    >>> text, [text[start:end] for start, end in found]
    ('<user>Hi</s><assistant>Hello</s>', ['Hello</s>'])
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text, found = template.generated(messages, where, **options)
    try:
        if found is None:
            if MARK in text:
                raise ValueError(f"{where}: a character U+{ord(MARK):X}, which no text has: leave it out")
            return text, [_Turn(template, text, messages, i, where, options).span() for i in turns if i >= first]
        if first and len(found) != len(turns):
            raise _UnclearError(f"messages {first + 1} and on are")
        return text, [span for span, turn in zip(found, turns, strict=True) if turn >= first] if first else found
    except _UnclearError as error:
        remedy = "set what it writes in {% generation %} ... {% endgeneration %}, in a file for --chat-template"
        what = f"{where}: where the assistant's {error} cannot be told from the chat template of {template.where}"
        raise ValueError(f"{what}: {remedy}") from None


class _Turn(NamedTuple):
    """One of the assistant's turns, in a text whose template does not say where it is."""

    template: Template
    text: str
    messages: Sequence[Message]
    turn: int
    where: str
    options: Mapping[str, Any]

    def span(self) -> tuple[int, int]:
        """Where it begins, after what asks for it, and where it ends, after what ends it."""
        whole = self._render(self._with_mark(self.turn))
        if whole.count(MARK) != 1:
            return self._by_prefixes()
        before, _, after = whole.partition(MARK)
        start, end = self._start(before), self._end(after)
        if start > end:
            raise _UnclearError(f"message {self.turn + 1} is")
        return start, end

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self.template.render(messages, self.where, prompt=prompt, **self.options)

    def _with_mark(self, place: int) -> list[Message]:
        content = [{"type": "text", "text": MARK}] if isinstance(self.messages[place].get("content"), list) else MARK
        marked = {**self.messages[place], "content": content}
        return [*self.messages[:place], marked, *self.messages[place + 1 :]]

    def _start(self, before: str) -> int:
        """Where it begins; `before` is what the template writes before its content."""
        asked = self._render(self.messages[: self.turn], prompt=True)
        shared = len(os.path.commonprefix([asked, before]))
        bare = (
            asked if shared == len(asked) and not before[shared:].strip() else self._render(self.messages[: self.turn])
        )
        if shared == len(asked):
            # A template without a generation prompt may name the assistant all the same.
            start = len(before) if asked == bare and before[shared:].strip() else shared
        elif asked.startswith(bare) and shared > len(bare):
            start = shared  # the prompt begins more, as <think>, than the answer does
        else:  # earlier turns are written otherwise where later ones follow
            tail = self._render(self._with_mark(self.turn - 1)[: self.turn], prompt=True).rpartition(MARK)[2]
            at = before.rfind(tail) if self.turn and tail.strip() else -1
            start = at + len(tail) if at >= 0 else -1
        if start < 0 or not self.text.startswith(before[:start]):
            raise _UnclearError(f"message {self.turn + 1} begins")
        return start

    def _end(self, after: str) -> int:
        """Where it ends; `after` is what the template writes after its content."""
        marked, last = self._with_mark(self.turn), self.turn + 1 == len(self.messages)
        alone = self._render(marked[: self.turn + 1]).partition(MARK)[2]
        followed = self._followed(marked, alone) if last else after
        closing = os.path.commonprefix([alone, followed])
        if closing != alone:  # what comes next may begin alike: <|end|> and <|eot|> share <|e
            ends = [closing.rfind(token) + len(token) for token in (*self.template.special, "\n") if token in closing]
            closing = closing[: max(ends, default=0)]
        if last and not closing.strip():
            closing = alone  # what ends a conversation ends its last turn
        rest = after[len(closing) :]
        if not self.text.endswith(rest):
            raise _UnclearError(f"message {self.turn + 1} ends")
        end = len(self.text) - len(rest)
        return len(self.text[:end].rstrip()) if closing.strip() else end

    def _followed(self, marked: list[Message], otherwise: str) -> str:
        try:
            return self._render([*marked, {"role": "user", "content": "-"}]).partition(MARK)[2]
        except ValueError:  # a template that takes no other turn after this one
            return otherwise

    def _by_prefixes(self) -> tuple[int, int]:
        """Of a turn whose content is not written, but what it calls."""
        asked = self._render(self.messages[: self.turn], prompt=True)
        until = self._render(self.messages[: self.turn + 1])
        if not (until.startswith(asked) and self.text.startswith(until)):
            raise _UnclearError(f"message {self.turn + 1} is")
        return len(asked), len(until.rstrip())


class _UnclearError(Exception):
    """What cannot be told of a turn."""

"""Chat: a tokenizer's own template, and which characters of what it renders are the assistant's turns.

A template says neither where a turn begins nor where it ends, unless it has `{% generation %}` blocks. Otherwise both
are found by rendering again, as each of these differs from the whole in one known way:

- with a mark in place of a turn's content: what is before the mark, and after it;
- what precedes the turn, with the generation prompt: where it ends, the answer begins;
- the turn as the last one, and with another after it: what both have after the mark is what ends a turn.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]
MARK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode keeps these for use inside of programs
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """A chat template in Jinja, rendered as transformers' `apply_chat_template` does it.

    Args:
      source: The template.
      where: The file that it is from.
      variables: What it may use beside the messages: `bos_token`, `eos_token` and so on.
      special: The tokenizer's special tokens, which nothing cuts in two.

    Raises:
      ModuleNotFoundError: jinja2 is not installed.
      ValueError: It is no Jinja.

    >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    >>> template = Template(source + "{% if add_generation_prompt %}<assistant>{% endif %}", "chat.jinja", {})
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> text, spans = template.spans(chat, "data.jsonl:1")
    >>> text, [text[start:end] for start, end in spans]
    ('<user>Hi</s><assistant>Hello</s>', ['Hello</s>'])
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, Any], special: Sequence[str] = ()):
        self.source, self.where, self.variables, self.special = source, where, variables, special
        self._compiled: Any = None

    def render(self, messages: Sequence[Message], where: str, *, prompt: bool = False, **options: Any) -> str:
        """The text of a conversation.

        Args:
          messages: Its messages.
          where: Where it is from, for errors.
          prompt: Whether with what asks for an answer (`add_generation_prompt`).
          **options: What else the template may use, such as `tools`.

        Raises:
          ValueError: The template refuses the messages.
        """
        text = self._marked(messages, where, prompt, options)
        return _blocks(text, where)[0] if GENERATION.search(self.source) else text

    def spans(self, messages: Sequence[Message], where: str, first: int = 0, **options: Any) -> tuple[str, Spans]:
        """The text of a conversation, and the characters of it that the assistant writes: each turn, and what ends it.

        Args:
          messages: As in `render`, and so are `where` and `options`.
          where: See `messages`.
          first: The message from which on turns count.
          **options: See `messages`.

        Raises:
          ValueError: The template refuses the messages, or where the turns are cannot be told.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            if GENERATION.search(self.source):
                text, spans = _blocks(self._marked(messages, where, False, options), where)
                if first and len(spans) != len(turns):
                    raise _UnclearError(f"messages {first + 1} and on are")
                return text, [
                    span for span, turn in zip(spans, turns, strict=True) if turn >= first
                ] if first else spans
            text = self.render(messages, where, **options)
            if MARK in text:
                raise ValueError(f"{where}: a character U+{ord(MARK):X}, which no text has: leave it out")
            return text, [_Turn(self, text, messages, i, where, options).span() for i in turns if i >= first]
        except _UnclearError as error:
            remedy = "set what it writes in {% generation %} ... {% endgeneration %}, in a file for --chat-template"
            what = f"{where}: where the assistant's {error} cannot be told from the chat template of {self.where}"
            raise ValueError(f"{what}: {remedy}") from None

    def _marked(self, messages: Sequence[Message], where: str, prompt: bool, options: Mapping[str, Any]) -> str:
        """With `OPEN` and `CLOSE` around what is in generation blocks."""
        import jinja2

        self._compiled = self._compiled or _compiled(self.source, self.where)
        given = {"tools": None, "documents": None} | {**self.variables} | {**options}
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=prompt, **given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            what = f"{where}: the chat template of {self.where} refuses this conversation: {error}"
            raise ValueError(f"{what}; correct the record, or give a --chat-template that takes it") from None


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


def _blocks(marked: str, where: str) -> tuple[str, Spans]:
    """
    >>> _blocks(f"ask{OPEN}answer{CLOSE}!", "data.jsonl:1")
    ('askanswer!', [(3, 9)])
    """
    parts, spans, at = re.split(f"([{OPEN}{CLOSE}])", marked), [], 0
    if parts[1::2] != [OPEN, CLOSE] * (len(parts) // 4):
        raise ValueError(f"{where}: a character U+{ord(OPEN):X} or U+{ord(CLOSE):X}, which no text has: leave it out")
    for place, part in enumerate(parts[::2]):
        if place % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    return "".join(parts[::2]), spans


def _compiled(source: str, where: str) -> Any:
    """The template in an environment as transformers makes it, with which published templates are written."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.nodes
        import jinja2.sandbox
    except ModuleNotFoundError:
        message = f"the chat template of {where} needs jinja2: pip install 'lora-jax[train]'"
        raise ModuleNotFoundError(message) from None

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_block"), [], [], body).set_lineno(line)

        def _block(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        what = f"{where}: its chat template is no Jinja (line {error.lineno}: {error.message})"
        raise ValueError(f"{what}: correct it, or give one as --chat-template FILE.jinja") from None

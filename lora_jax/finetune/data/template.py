"""Template: how a model wants a conversation written, in Jinja, as transformers reads and renders it."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]
OPEN, CLOSE = "\ufdd1", "\ufdd2"  # Unicode keeps these for use inside of programs
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """A chat template in Jinja, rendered as transformers' `apply_chat_template` does it.

    Args:
      source: The template.
      where: The file that it is from.
      variables: What it may use beside the messages: `bos_token`, `eos_token` and so on.
      special: The tokenizer's special tokens, which nothing cuts in two.
      date: The day that it is for the template, as "2025-01-31"; None for today.

    Raises:
      ModuleNotFoundError: jinja2 is not installed.
      ValueError: It is no Jinja, or the date is none.

    >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    >>> template = Template(source + "{% if add_generation_prompt %}<assistant>{% endif %}", "chat.jinja", {})
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> template.render(chat, "data.jsonl:1"), template.render(chat[:1], "data.jsonl:1", prompt=True)
    ('<user>Hi</s><assistant>Hello</s>', '<user>Hi</s><assistant>')
    """

    def __init__(
        self,
        source: str,
        where: str,
        variables: Mapping[str, Any],
        special: Sequence[str] = (),
        date: str | None = None,
    ):
        self.source, self.where, self.variables, self.special = source, where, variables, special
        self.now = None if date is None else day(date)
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
        return self._rendered(messages, where, prompt, options)[0]

    def generated(self, messages: Sequence[Message], where: str, **options: Any) -> tuple[str, Spans | None]:
        """The text of a conversation, and which characters are in generation blocks; None where there are no blocks.

        Args:
          messages: As in `render`, and so are `where` and `options`.
          where: See `messages`.
          **options: See `messages`.

        Raises:
          ValueError: The template refuses the messages.
        """
        return self._rendered(messages, where, False, options)

    def _rendered(
        self, messages: Sequence[Message], where: str, prompt: bool, options: Mapping[str, Any]
    ) -> tuple[str, Spans | None]:
        import jinja2

        self._compiled = self._compiled or _compiled(self.source, self.where, self.now)
        given = {"tools": None, "documents": None} | {**self.variables} | {**options}
        try:
            text = self._compiled.render(messages=messages, add_generation_prompt=prompt, **given)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            what = f"{where}: the chat template of {self.where} refuses this conversation: {error}"
            raise ValueError(f"{what}; correct the record, or give a --chat-template that takes it") from None
        return _blocks(text, where) if GENERATION.search(self.source) else (text, None)


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


def day(date: str) -> datetime.datetime:
    """The first moment of a day.

    Raises:
      ValueError: It is none.

    >>> day("2025-01-31").strftime("%d %b %Y")
    '31 Jan 2025'
    """
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise ValueError(f"--date {date}: it is no day: write it as 2025-01-31") from None


def _compiled(source: str, where: str, now: datetime.datetime | None) -> Any:
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
    environment.globals["strftime_now"] = lambda format: (now or datetime.datetime.now()).strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        what = f"{where}: its chat template is no Jinja (line {error.lineno}: {error.message})"
        raise ValueError(f"{what}: correct it, or give one as --chat-template FILE.jinja") from None

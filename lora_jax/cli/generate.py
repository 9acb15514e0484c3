"""`lora-jax generate`: a base and its adapters on the same prompts; see `lora_jax.finetune.answers`."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from lora_jax.cli.options import ADAPTER, MODEL, add_json, check_new, need, positive, whole, write_json

HELP = "what a model and its adapters answer, side by side"
DESCRIPTION = """\
What a model goes on with after a prompt, and then what it goes on with under
each adapter, which is put on without being merged. The likeliest token is
taken each time, unless --temperature, --top-k or --top-p ask for draws. Of a
classifier it shows how probable each label is.
"""
EXAMPLES = """\
examples:
  lora-jax generate --model DIR --adapter runs/1 --prompt "A list is"
  lora-jax generate --model DIR --adapter runs/1 --adapter runs/2 \\
      --chat --prompt "What is a list?" --max-new-tokens 200
  lora-jax generate --model DIR --prompts prompts.txt --json answers.json
  lora-jax generate --model DIR --prompt "Once" --temperature 0.8 --seed 1

A .txt file has a prompt on each line; .jsonl and .csv have it as "prompt" or
"text", and .jsonl as "messages", too, of which the last of the assistant is
left out. --chat has the tokenizer's own chat template write what a user says.
"""
SUBJECT = None
MEMORY = "give fewer --max-new-tokens or shorter prompts, or --precision bfloat16"


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=MODEL)
    option("--adapter", metavar="PATH", action="append", default=[], help=f"{ADAPTER}; give it for each that there is")
    option("--prompt", metavar="TEXT", action="append", default=[], help="what to go on from; give it for each")
    option("--prompts", metavar="FILE", action="append", default=[], help="a file of prompts: .txt, .jsonl, .csv")
    option("--chat", action="store_true", help="prompts are what a user says: write them by the chat template")
    option("--chat-template", metavar="FILE", help="a template in Jinja, instead of the tokenizer's own")
    option(
        "--max-new-tokens",
        metavar="N",
        type=whole(1),
        default=64,
        help="the most that an answer has (default: %(default)s)",
    )
    option("--temperature", metavar="T", type=positive(), help="draw tokens: the higher, the more evenly")
    option("--top-k", metavar="N", type=whole(1), help="draw one of so many likeliest tokens")
    option("--top-p", metavar="P", type=positive(1), help="draw one of the likeliest, as few as make up P")
    option("--seed", metavar="N", type=whole(0), default=0, help="of what is drawn (default: %(default)s)")
    option("--precision", choices=("float32", "bfloat16", "float16"), help="of the base (default: as it is stored)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answers, prints, and writes what `--json` names."""
    need({"tokenizers"}, extra="train")
    check_new(arguments.json)
    from lora_jax.finetune import answers, prompts
    from lora_jax.formats import huggingface

    directory = huggingface.directory_of(arguments.model)
    if arguments.chat_template and not arguments.chat and not arguments.prompts:
        raise ValueError("--chat-template: only conversations are written by it: give --chat, too")
    given = prompts.gather(arguments.prompt, arguments.prompts, arguments.chat)
    options = answers.Options(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        dtype=arguments.precision,
        chat_template=arguments.chat_template,
    )
    found = dict(answers.answers(directory, [*dict.fromkeys(arguments.adapter)], given, options))
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    for number, prompt in enumerate(given):
        print("\n".join(_shown(number, len(given), prompt.text, {by: own[number] for by, own in found.items()}, width)))
    write_json(arguments.json, _described(arguments, given, found))


def _shown(number: int, of: int, prompt: str, found: dict[str, Any], width: int) -> list[str]:
    """The lines of a prompt and its answers."""
    lines = [f"── prompt {number + 1} of {of} ".ljust(width, "─"), *_wrapped(prompt, width), ""]
    for by, answer in found.items():
        count = "" if answer.probabilities else f"{answer.tokens} tokens{', then it ended' if answer.ended else ''}"
        lines.append(f"{by}{' ' * max(2, width - len(by) - len(count))}{count}".rstrip())
        if answer.probabilities:
            ranked = sorted(answer.probabilities.items(), key=lambda item: -item[1])
            widest = max(len(label) for label, _ in ranked)
            lines += [f"  {_plain(label):{widest}}  {probability:6.1%}" for label, probability in ranked]
        else:
            lines += _wrapped(re.sub(r"\n{4,}", _counted, answer.text.removeprefix(" ")), width, "  ")
        lines.append("")
    return lines


def _counted(run: re.Match[str]) -> str:
    return f"\n\n[{len(run[0]) - 1} empty lines]\n\n"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A text in lines of a width, with its own line breaks kept."""
    options: Any = {"initial_indent": indent, "subsequent_indent": indent, "drop_whitespace": True}
    return [line for own in _plain(text).split("\n") for line in textwrap.wrap(own, width, **options) or [""]]


def _plain(text: str) -> str:
    """A text without what would steer a terminal.

    >>> _plain("a\\x1b[31mb")
    'a�[31mb'
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.strip("\n").expandtabs(4))


def _described(arguments: argparse.Namespace, given: Sequence[Any], found: dict[str, list[Any]]) -> dict[str, Any]:
    """What `--json` has."""

    def answer(by: str, number: int) -> dict[str, Any]:
        own = found[by][number]
        if own.probabilities:
            return {"by": by, "label": own.text, "probabilities": own.probabilities}
        return {"by": by, "text": own.text, "tokens": own.tokens, "ended": own.ended}

    options = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "precision", "chat")
    return {
        "model": arguments.model,
        **{name: getattr(arguments, name) for name in options},
        "prompts": [
            {"prompt": prompt.text, "where": prompt.where, "answers": [answer(by, number) for by in found]}
            for number, prompt in enumerate(given)
        ],
    }

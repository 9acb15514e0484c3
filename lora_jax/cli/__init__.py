"""The command line: `lora-jax COMMAND --model ... --adapter ... --data ... --out ...`, one file for each command.

Commands are thin: each says its options, and calls the library. A module of a command has

- `HELP`, `DESCRIPTION`, `EXAMPLES`: what it is for, in a line and at length, and how it is called;
- `SUBJECT`: the option that may be given without its name, in the first place: `lora-jax info adapter.safetensors`;
- `MEMORY`, if it may run out of memory: what takes less of it;
- `add(parser)`, which adds its options, and `run(arguments)`, which returns an exit status, or None for 0.

Exit statuses are in `STATUSES`, as the help shows them.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import lora_jax

# In the order in which one comes to use them.
COMMANDS = ("sites", "plan", "train", "generate", "info", "merge", "convert", "combine", "extract", "demo")
DESCRIPTION = """\
Fine-tune a model with LoRA in JAX, look at what came out, and hand it on.
A model is a directory as Hugging Face's transformers keeps it, or
hf://ORG/NAME, which is downloaded. `lora-jax COMMAND --help` explains a
command, with examples.
"""
STATUSES = """\
exit status:
  0    it is done
  1    it is done and the answer is no, or training or the machine failed
  2    a mistake, told in one line; nothing is left behind (--debug shows
       where in the code it was noticed)
  130  interrupted by Ctrl-C; others above 128 are 128 + a signal's number
"""
EXAMPLES = """\
from data to an adapter, and on:
  lora-jax sites --model DIR
  lora-jax train --model DIR --data chats.jsonl --out runs/1 --dry-run
  lora-jax train --model DIR --data chats.jsonl --out runs/1
  lora-jax generate --model DIR --adapter runs/1 --prompt "What is a list?"
  lora-jax info runs/1 --model DIR
  lora-jax merge --model DIR --adapter runs/1 --out merged

"""


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and no option may be abbreviated, so that new ones change none."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: The arguments; None for those of the process.

    Returns:
      The exit status.
    """
    if argv is None and not sys.warnoptions:  # what libraries have to say to their users is not for ours
        warnings.filterwarnings("ignore", module=r"(?!lora_jax)")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of an encoding, perhaps, that has no ─ and no ‖
            stream.reconfigure(errors="replace")
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as of `lora-jax ... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return _failed(arguments, "interrupted", 130)
    except (OSError, ValueError, ModuleNotFoundError) as error:  # how the library says what to do differently
        return _failed(arguments, line(told(error)), 2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = line(str(error)).rpartition("RESOURCE_EXHAUSTED: ")[2][:100].rstrip(". ")
        return _failed(arguments, f"out of memory{f' ({reason})' if reason else ''}: {arguments.memory}", 1)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Arguments as options of their command, which are in `vars` of what is returned, with `run` and `prog`.

    Raises:
      SystemExit: With 2 for a mistake, which is told on stderr; with 0 for help.
    """
    words = [*words]
    modules: dict[str, Any] = {name: importlib.import_module(f"lora_jax.cli.{name}") for name in COMMANDS}
    if len(words) > 1 and words[0] in modules and not words[1].startswith("-") and modules[words[0]].SUBJECT:
        words.insert(1, modules[words[0]].SUBJECT)
    parser = Parser(prog="lora-jax", description=DESCRIPTION, epilog=EXAMPLES + STATUSES)
    parser.add_argument("--version", action="version", version=f"lora-jax {lora_jax.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, module in modules.items():
        own = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EXAMPLES)
        module.add(own)
        own.add_argument("--debug", action="store_true", help="show where in the code a mistake is noticed")
        memory = getattr(module, "MEMORY", "take a machine or a device with more")
        own.set_defaults(run=module.run, prog=own.prog, memory=memory, parser=own)
    if not words:
        parser.error(f"COMMAND is missing, one of {', '.join(COMMANDS)}")
    if not words[0].startswith("-") and words[0] not in modules:
        parser.error(f"{words[0]!r} is no command{close_to(words[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        own = getattr(arguments, "parser", parser)
        known = [option for action in own._actions for option in action.option_strings]
        own.error(f"unrecognized arguments: {' '.join(unknown)}{close_to(unknown[0].partition('=')[0], known)}")
    return arguments


def close_to(word: str, known: Iterable[str]) -> str:
    """What may have been meant, in an error.

    >>> close_to("trian", ["train", "plan"]), close_to("x", ["train"])
    (', did you mean train?', '')
    """
    matches = difflib.get_close_matches(word, [*known], n=1)
    return f", did you mean {matches[0]}?" if matches else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a host or a device that has no memory left.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("INTERNAL: a bug"))
    (True, False)
    """
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def told(error: Exception) -> str:
    """What an error says, without the number that the operating system gives it.

    >>> told(FileNotFoundError(2, "No such file or directory", "a.txt")), told(ValueError("--rank 0"))
    ("'a.txt': No such file or directory", '--rank 0')
    """
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"'{error.filename}': {error.strerror}"


def line(message: str) -> str:
    """A message's first two lines as one; the second is the first of those that it lists.

    >>> line("it does not fit:\\n  a is missing\\n  b is missing")
    'it does not fit: a is missing (and 1 more: --debug shows all)'
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    rest = f" (and {len(lines) - 2} more: --debug shows all)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + rest


def _failed(arguments: argparse.Namespace, message: str, status: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"{arguments.prog}: {message}", file=sys.stderr)
    return status

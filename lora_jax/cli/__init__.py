"""The command line: `lora-jax COMMAND --model ... --adapter ... --data ... --out ...`, one file for each command.

Commands are thin: each says its options, and calls the library. A module of a command has

- `HELP`, `DESCRIPTION`, `EXAMPLES`: what it is for, in a line and at length, and how it is called;
- `SUBJECT`: the option that may be given without its name, in the first place: `lora-jax info adapter.safetensors`;
- `add(parser)`, which adds its options, and `run(arguments)`, which returns an exit status, or None for 0.

Exit statuses: 0, it is done; 1, it is done, and the answer is no, or training failed; 2, a mistake of the user's, told
in one line, after which nothing is left behind; 128 + the number of a signal that ended it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

COMMANDS = ("train", "merge", "convert", "info", "extract", "combine", "plan", "demo")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, and no option may be abbreviated, so that new ones change none."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: The arguments; None for those of the process.

    Returns:
      The exit status.
    """
    words = [*(sys.argv[1:] if argv is None else argv)]
    modules = {name: importlib.import_module(f"lora_jax.cli.{name}") for name in COMMANDS}
    if len(words) > 1 and words[0] in modules and not words[1].startswith("-") and modules[words[0]].SUBJECT:
        words.insert(1, modules[words[0]].SUBJECT)
    parser = Parser(prog="lora-jax", description="LoRA for any JAX function over any pytree.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, module in modules.items():
        own = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EXAMPLES)
        module.add(own)
        own.add_argument("--debug", action="store_true", help="show where an error comes from")
        own.set_defaults(run=module.run, prog=own.prog)
    arguments = parser.parse_args(words)
    try:
        return arguments.run(arguments) or 0
    except (OSError, ValueError, ModuleNotFoundError) as error:  # how the library says what to do differently
        if arguments.debug:
            raise
        print(f"{arguments.prog}: {_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{arguments.prog}: interrupted", file=sys.stderr)
        return 130


def _line(message: str) -> str:
    """A message's first two lines as one; the second is the first of those that it lists.

    >>> _line("it does not fit:\\n  a is missing\\n  b is missing")
    'it does not fit: a is missing (and 1 more: --debug shows all)'
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    rest = f" (and {len(lines) - 2} more: --debug shows all)" if len(lines) > 2 else ""
    return " ".join(lines[:2]) + rest

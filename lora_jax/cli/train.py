"""`lora-jax train`: from a model's directory and a file of data to an adapter; see `lora_jax.finetune`."""

from __future__ import annotations

import argparse
import dataclasses

from lora_jax.finetune.settings import Settings

HELP = "fine-tune a model on a file of data"
DESCRIPTION = """\
From a model's directory and a file of data to an adapter.
"""
EXAMPLES = ""
SUBJECT = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options, a flag for each field of `Settings`."""
    for field in dataclasses.fields(Settings):
        kind = {"int": int, "float": float, "str": str}.get(str(field.type).split(" ")[0], str)
        options = {"nargs": "+"} if str(field.type).startswith("tuple") else {"type": kind}
        if field.type == "bool":
            options = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=field.metadata["help"], **options
        )


def run(arguments: argparse.Namespace) -> None:
    """Trains."""
    from lora_jax.finetune import job

    names = {field.name for field in dataclasses.fields(Settings)}
    print(job.run(Settings(**{name: value for name, value in vars(arguments).items() if name in names})))

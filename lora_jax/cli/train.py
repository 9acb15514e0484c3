"""`lora-jax train`: from a model's directory and a file of data to an adapter; see `lora_jax.finetune`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lora_jax.cli.options import need

HELP = "fine-tune a model on a file of data"
DESCRIPTION = """\
From a model's directory and a file of data to an adapter that serves.

It shows what it will do, and what that takes of memory; it refuses what cannot
work. Then it trains, evaluates before and after on rows that it has held out,
and writes into --out the adapter (adapter.safetensors, and the same as PEFT's
folder), the settings (train.yaml), a log (log.jsonl) and a figure (loss.png).

Cut off at any moment, by Ctrl-C too, the same command goes on where it was;
the result is the same, to the bit, as without.
"""
EXAMPLES = """\
Each setting is a flag, or a key of the same name in a file (--config), with _
for -. Flags win over the file. Paths in it are relative to where the command
runs. --set takes the variant's other fields: --set scaling=rank_stabilized.

examples:
  lora-jax train --model llama --data notes.txt --out run --dry-run
                        what would be done, and what it takes of memory
  lora-jax train --model llama --data notes.txt --out run
                        plain text; LoRA of rank 8 on all linear layers
  lora-jax train --model hf://Qwen/Qwen3-0.6B --data chat.jsonl --out run \\
      --epochs 3 --batch 16 --accumulate 4 --eval-every 50 --patience 3
                        chat: lines of {"messages": [...]}; stops at its best
  lora-jax train --model bert --data reviews.csv --out run --targets attention
                        an encoder learns to classify: columns text and label
  lora-jax train --model llama --data notes.txt --out run \\
      --variant DoRA --rank 16 --alpha 32 --dropout 0.05 --init olora
  lora-jax train --model llama --data notes.txt --out run \\
      --precision bfloat16 --remat products --mesh fsdp=4,tp=2
                        weights split over eight devices
  lora-jax train --config run/train.yaml --seed 1 --out run-1
                        a run once more, with another seed
  lora-jax train ...    the same command once more: goes on where it was cut off

Most of the time before the first step is XLA's, compiling it. With a folder in
JAX_COMPILATION_CACHE_DIR, JAX keeps what it has compiled for the next run.
"""
SUBJECT = None
MEMORY = "lower --batch or --length, raise --accumulate, take --remat products, --precision bfloat16 or --mesh"

GROUPS = {
    "files": "files",
    "data": "data",
    "adapter": "adapter",
    "training": "training",
    "machine": "memory and devices",
    "records": "evaluation, log and checkpoints",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Its options, a flag for each field of `Settings`."""
    from lora_jax.finetune.values import FIELDS

    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    groups["files"].add_argument("--config", metavar="FILE", help="settings in YAML or TOML, as train.yaml of a run")
    groups["files"].add_argument(
        "--dry-run", action="store_true", help="show what would be done, and an example of the data; write nothing"
    )
    groups["files"].add_argument("--json", metavar="FILE", type=Path, help="what was found, for programs")
    for name, field in FIELDS.items():
        kind = str(field.type)
        options: dict[str, Any] = {"metavar": _metavar(field)}
        if kind.startswith("bool"):
            options = {"action": argparse.BooleanOptionalAction}
        elif kind.startswith(("tuple", "dict")):
            options |= {"nargs": "+", "action": "extend"}
        groups[field.metadata["group"]].add_argument(
            "--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=_help(field), dest=name, **options
        )


def run(arguments: argparse.Namespace) -> int | None:
    """Trains."""
    need({"rich", "tokenizers", "yaml"}, extra="train")
    from lora_jax import distributed
    from lora_jax.finetune import job
    from lora_jax.finetune.configuration import read
    from lora_jax.finetune.journal import Diverged
    from lora_jax.finetune.values import FIELDS, Given, settings

    distributed.check_alone()
    given = read(arguments.config) if arguments.config else {}
    for name, said in vars(arguments).items():
        if name in FIELDS:
            given[name] = Given(said, "--" + name.replace("_", "-"))
    try:
        found = job.run(settings(given), dry=arguments.dry_run)
    except Diverged as error:
        print(f"{arguments.prog}: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return None


def _metavar(field: Any) -> str:
    if "metavar" in field.metadata:
        return field.metadata["metavar"]
    if "choices" in field.metadata:
        return "|".join(field.metadata["choices"])
    return {"int": "N", "float": "X"}.get(str(field.type).partition(" ")[0], "WORD")


def _help(field: Any) -> str:
    text = field.metadata["help"].replace("%", "%%")
    shown = {True: "yes", False: "no"}.get(field.default) if isinstance(field.default, bool) else field.default
    if field.name in ("model", "data", "out") or not isinstance(shown, str | int | float) or "default:" in text:
        return text
    return f"{text} (default: {shown})"

"""`lora-jax convert`: an adapter in another form; see `lora_jax.formats.native` and `lora_jax.formats.peft`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_jax.cli import options

HELP = "an adapter as PEFT's folder, or as a native file"
DESCRIPTION = """\
Writes an adapter in another form: --to peft, a folder that Hugging Face PEFT
and servers such as vLLM load; --to native, one file that has every variant,
and knows which base it is for. The factors are the same bits in both, so that
there and back again is the same adapter. What a form cannot say is an error.
"""
EXAMPLES = """\
examples:
  lora-jax convert --model base --adapter run --to peft --out folder
  lora-jax convert --model base --adapter run --to peft --portable --out folder
                         for servers that know one rank and alpha, no rsLoRA
  lora-jax convert --model base --adapter folder --to native \\
    --out adapter.safetensors
"""
SUBJECT = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=options.MODEL)
    option("--adapter", metavar="A", type=Path, required=True, help=options.ADAPTER)
    option("--to", choices=("peft", "native"), required=True, help="the form")
    option("--out", metavar="O", type=Path, required=True, help="the folder, or of a native adapter the file")
    option("--portable", action="store_true", help="of PEFT's: one rank, one alpha, no rsLoRA, for servers")


def run(arguments: argparse.Namespace) -> None:
    """Converts."""
    from lora_jax.cli.base import adapters_of, hub_name, task_type
    from lora_jax.finetune.base import LABELS
    from lora_jax.formats import atomic, native, peft

    if arguments.portable and arguments.to == "native":
        raise ValueError("--portable does nothing with --to native: leave it out")
    options.refuse_existing(arguments.out)
    if arguments.to == "native" and arguments.out.is_dir():
        raise IsADirectoryError(f"{arguments.out}: a folder, and a native adapter is a file: give a name in it")
    base, (lora_params,) = adapters_of(arguments.model, [arguments.adapter])
    if arguments.to == "native":
        native.save(arguments.out, lora_params, base.fingerprint())
    else:
        peft.save(
            arguments.out,
            lora_params,
            base.names,
            base=base.deferred(),
            portable=arguments.portable,
            base_model_name_or_path=hub_name(arguments.model),
            task_type=task_type(base),
        )
        labels = (arguments.adapter if arguments.adapter.is_dir() else arguments.adapter.parent) / LABELS
        if labels.is_file():  # of a classifier's classes, beside whose adapter they are
            atomic.write(arguments.out / LABELS, labels.read_bytes())
    print(f"{arguments.out}: written")

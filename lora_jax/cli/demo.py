"""`lora-jax demo`: see `lora_jax.demo.job`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_jax.cli.options import need, whole

HELP = "adapt a pretrained sentence encoder, and compare LoRA with what else one could train"
DESCRIPTION = """\
Fine-tunes a pretrained sentence encoder (MiniLM, 22.6 million parameters) to
tell whether two neighboring words of a sentence have been swapped. The
sentences are those of Python's own documentation, so nothing is downloaded.
A linear probe, LoRA on query and value, and LoRA on all linear layers train
on the same sentences and are tested on others, from other files. It takes
some four minutes on two CPU cores.
"""
EXAMPLES = """\
It writes into the output folder: the adapters (*.safetensors, for
lora_jax.load), results.json, and figure.png.

examples:
  lora-jax demo                         the whole comparison
  lora-jax demo --quick                 all in a minute, too short to learn
  lora-jax demo --full                  full fine-tuning too, two more minutes
  lora-jax demo --rank 2 --seed 1       a smaller adapter, another draw
  lora-jax demo --model ~/bert-base     a BERT of yours
  lora-jax demo --model hf://google-bert/bert-base-uncased
                                        one that is downloaded

It uses all devices of the machine, and of several machines when started on each
of them, by srun, mpirun or with JAX_COORDINATOR_ADDRESS=host:port,
JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment.
"""
SUBJECT = None


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", help="a BERT encoder in Hugging Face's layout, or hf://NAME to download one")
    option("--out", metavar="DIR", type=Path, default=Path("demo"), help="where results go (default: %(default)s)")
    option("--seed", metavar="N", type=whole(0), default=0, help="for all that is random (default: %(default)s)")
    option("--steps", metavar="N", type=whole(1), help="of 32 sentences each (default: 300; with --quick 20)")
    option("--rank", metavar="N", type=whole(1), default=8, help="LoRA's rank (default: %(default)s)")
    option("--full", action="store_true", help="full fine-tuning too")
    option("--quick", action="store_true", help="few sentences and few steps, to see that it works")
    option("--no-figure", action="store_true", help="no figure.png, for which matplotlib is needed")


def run(arguments: argparse.Namespace) -> None:
    """Runs it."""
    need({"rich", "tokenizers"} if arguments.no_figure else {"rich", "tokenizers", "matplotlib"}, extra="demo")
    from lora_jax import distributed
    from lora_jax.demo import encoder, job, report

    distributed.initialize()
    quick = {"steps": 20, "sentences": 300, "lengths": (24,)} if arguments.quick else {}
    given = {"steps": arguments.steps} if arguments.steps else {}
    settings = job.Settings(seed=arguments.seed, rank=arguments.rank, full=arguments.full, **(quick | given))
    pretrained = encoder.load(arguments.model)
    widest = pretrained.model.config.hidden_size
    if arguments.rank > widest:
        raise ValueError(f"--rank {arguments.rank}: the encoder's layers have {widest} features, so that is the most")
    with distributed.output(arguments.out) as out:
        out.mkdir(parents=True, exist_ok=True)
        with report.progress() as watch:
            found = job.run(settings, pretrained, out, watch)
        report.show(found)
        report.write(found, out / "results.json")
        if not arguments.no_figure:
            report.draw(found, out / "figure.png")
        figure = "" if arguments.no_figure else "figure.png, "
        print(f"\nWritten to {out}: {figure}results.json, and the adapters, *.safetensors")

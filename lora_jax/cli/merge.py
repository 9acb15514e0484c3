"""`lora-jax merge`: a base and adapters as one model's directory; see `lora_jax.formats.huggingface.merge`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.cli import options

if TYPE_CHECKING:
    from lora_jax.formats.huggingface import Loss

HELP = "a base and its adapter as one model, in Hugging Face's files"
DESCRIPTION = """\
Writes a model's directory with adapters merged into its weights: config,
tokenizer and shards as the base has them. It runs anywhere the base does, at
the base's speed. One tensor at a time is in memory, so that a model may be
larger than the machine's.

W + ΔW is formed in float32 and rounded once, to the base's dtype. bfloat16 has
8 bits: of a weight, changes below 1/512 are lost. How much of the update that
is, is measured, and said where it is more than a tenth of its norm (less, and
99 % of its energy arrives). Then there are two ways out: --dtype float32 keeps
all at twice the size, --round stochastic keeps it on average at no cost.
"""
EXAMPLES = """\
examples:
  lora-jax merge --model base --adapter run --out merged
  lora-jax merge --model base --adapter run --out merged --dtype float32
  lora-jax merge --model base --adapter run --out merged --round stochastic
  lora-jax merge --model base --adapter law=0.7 --adapter french=0.5 --out both
                                        base + 0.7 ΔW of law + 0.5 ΔW of french
"""
SUBJECT = None

# A tenth of the norm is a hundredth of the energy: 99 % of ‖ΔW‖² arrives.
NOTEWORTHY = 0.1


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    option = parser.add_argument
    option("--model", metavar="DIR", required=True, help=options.MODEL)
    option(
        "--adapter",
        metavar="A[=WEIGHT]",
        type=options.weighted,
        action="append",
        required=True,
        help=f"{options.ADAPTER}; again for each of several",
    )
    option(
        "--out", metavar="DIR", type=Path, required=True, help="the merged model's directory, which is not there yet"
    )
    option("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as the base has them)")
    option("--round", choices=("nearest", "stochastic"), default="nearest", help="how (default: %(default)s)")
    option("--seed", metavar="N", type=options.whole(0), help="of --round stochastic (default: 0)")
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Merges."""
    from lora_jax.algebra.summed import summed
    from lora_jax.cli.base import adapters_of
    from lora_jax.formats import huggingface
    from lora_jax.table import size

    if arguments.seed is not None and arguments.round == "nearest":
        raise ValueError("--seed does nothing with --round nearest: leave it out, or give --round stochastic")
    options.refuse_existing(arguments.out)
    options.check_new(arguments.json, arguments.out)
    base, adapters = adapters_of(arguments.model, [given.path for given in arguments.adapter])
    weights = [given.weight for given in arguments.adapter]
    lora_params = summed(adapters, weights, base=base.deferred()) if [*weights] != [1.0] else adapters[0]
    losses: dict[str, Loss] = {}
    seed = (arguments.seed or 0) if arguments.round == "stochastic" else None
    tensors = huggingface.merge(
        base.checkpoint,
        base.params,
        lora_params,
        base.names,
        dtype=arguments.dtype,
        seed=seed,
        report=lambda loss: losses.__setitem__(loss.name, loss),
    )
    merged = {name: x for name, x in tensors.items() if isinstance(x, huggingface.Lazy)}
    dtypes = sorted({str(x.dtype) for x in merged.values()})
    if seed is not None and dtypes == ["float32"]:
        raise ValueError("--round stochastic does nothing in float32: leave it out, or give --dtype bfloat16")
    huggingface.write(arguments.out, tensors, source=base.checkpoint, dtype=arguments.dtype)
    held = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {size(held)}, {len(merged)} of {len(tensors)} tensors merged, in {dtypes[0]}")
    _tell(losses, dtypes[0], stochastic=seed is not None)
    options.write_json(arguments.json, _numbers(losses, held, len(merged), len(tensors), dtypes))


def _tell(losses: dict[str, Loss], dtype: str, stochastic: bool) -> None:
    """What rounding cost: a line, and to stderr where it is a warning."""
    from lora_jax.formats.huggingface import rounding

    whole = rounding.total(losses.values())
    if not whole.update:
        return
    worst = max(losses.values(), key=lambda loss: loss.share)
    stuck = f"{100 * whole.stuck / max(whole.moved, 1):.0f} % of the weights that it moves stay as they were"
    lost = f"rounding to {dtype} changes the update by {whole.share:.2g} of its norm"
    if stochastic:
        print(f"{lost}, at random: on average nothing is lost")
    elif whole.share > NOTEWORTHY or worst.share > NOTEWORTHY:
        print(
            f"warning: {dtype} keeps {100 * max(0.0, 1 - whole.share):.0f} % of the update: of ‖ΔW‖ "
            f"{whole.update**0.5:.3g}, {whole.error**0.5:.3g} is lost in rounding, and {stuck} "
            f"(worst: {worst.name}, {100 * worst.share:.0f} % lost). "
            "--dtype float32 keeps all, --round stochastic keeps it on average",
            file=sys.stderr,
        )
    else:
        print(f"{lost}: less than a tenth, so that 99 % of its energy arrives")


def _numbers(losses: dict[str, Loss], held: int, merged: int, tensors: int, dtypes: list[str]) -> dict[str, Any]:
    """What --json holds."""
    from lora_jax.formats.huggingface import rounding

    def of(loss: Loss) -> dict[str, Any]:
        norms = {"update": loss.update**0.5, "error": loss.error**0.5, "lost": loss.share}
        return {**norms, "moved": loss.moved, "stuck": loss.stuck}

    found = {"bytes": held, "merged": merged, "tensors": tensors, "dtypes": dtypes}
    return {**found, "rounding": of(rounding.total(losses.values())), "each": {n: of(x) for n, x in losses.items()}}

"""Does PEFT, on transformers' model and tokenizer, get the same perplexity? python experiments/session/check_peft.py

Needs the extra `peft`. It takes nothing from lora_jax: transformers' tokenizer makes the tokens, its model the logits,
and PEFT loads the adapter as anyone would. Prints the perplexity of the base, of the base with the adapter, and of the
merged directory, beside what `lora-jax train` said; the exit status is 1 where they differ by more than 1e-5 of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def pieces(texts: list[str], tokenizer, length: int) -> Iterator[list[int]]:
    """What sees each other: a document, or pieces of one that share a token, so that each is predicted once."""
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        yield from (ids[start : start + length] for start in range(0, len(ids) - 1, length - 1))


@torch.no_grad()
def perplexity(model, rows: list[list[int]], batch: int = 16) -> float:
    """Of every token but the first of each row."""
    total = count = 0
    for start in range(0, len(rows), batch):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows[start : start + batch]], True, -100)
        here = ids != -100
        logits = model(input_ids=ids.clamp(min=0), attention_mask=here.long()).logits.double()
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="sum"))
        count += int(here[:, 1:].sum())
    return math.exp(total / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("model", "base"),
        ("adapter", "lora"),
        ("merged", "lora-merged"),
        ("data", "held_out.jsonl"),
    ):
        parser.add_argument(f"--{name}", type=Path, default=Path(default), help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, help="as of lora-jax train (default: %(default)s)")
    parser.add_argument(
        "--expected", type=float, nargs=2, metavar="PPL", help="of base and adapter, as lora-jax has it"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")
    arguments = parser.parse_args()

    texts = [json.loads(line)["text"] for line in arguments.data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = list(pieces(texts, tokenizer, arguments.length))

    base = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    found = {"base": perplexity(base, rows)}
    adapted = peft.PeftModel.from_pretrained(base, str(arguments.adapter)).eval()
    found["base + adapter"] = perplexity(adapted, rows)
    if arguments.merged.exists():
        found["merged"] = perplexity(AutoModelForCausalLM.from_pretrained(arguments.merged).eval(), rows)

    expected = dict(zip(("base", "base + adapter"), arguments.expected or (), strict=False))
    if "merged" in found and expected:
        expected["merged"] = expected["base + adapter"]
    apart = {name: abs(found[name] / value - 1) for name, value in expected.items()}
    for name, value in found.items():
        print(f"{name:15} {value:.6f}" + (f"  lora_jax {expected[name]:.6f}" if expected else ""))
    if apart:
        print(f"apart by {max(apart.values()):.1e} of it at most")
    if arguments.json:
        arguments.json.write_text(json.dumps({"peft": found, "lora_jax": expected, "apart": apart}, indent=2) + "\n")
    return int(any(value > 1e-5 for value in apart.values()))


if __name__ == "__main__":
    sys.exit(main())

"""The README's session, and its fine-tuning over seeds: python experiments/session/run.py --out DIR [--tune].

Every step is a command, as one would type it. Writes results.json beside this file, and prints the README's table.
With --tune it looks for learning rates instead, on a part of topics.jsonl, and leaves held_out.jsonl alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHAPE = ["--length", "128", "--batch", "8", "--epochs", "3"]
WAYS = {  # with the learning rates that --tune found
    "LoRA": ["--rank", "16", "--learning-rate", "1e-2"],
    "LoRA, tokens too": ["--rank", "16", "--targets", ".*/(kernel|embedding)", "--learning-rate", "1e-2"],
    "Full": ["--variant", "Full", "--targets", "all", "--learning-rate", "2e-3"],
}
NAMES = {"LoRA": "lora", "LoRA, tokens too": "lora-tokens", "Full": "full"}
TITLES = {
    "LoRA": "LoRA of rank 16, all linear layers",
    "LoRA, tokens too": "the same, and the table of tokens",
    "Full": "full fine-tuning",
}
RATES = {**dict.fromkeys(("LoRA", "LoRA, tokens too"), ("5e-3", "1e-2", "2e-2")), "Full": ("1e-3", "2e-3", "4e-3")}


def call(out: Path, *words: str) -> float:
    """Runs a command in a directory; its seconds."""
    print("$", *words, flush=True)
    begin = time.perf_counter()
    program = [sys.executable, "-m", "lora_jax.cli"] if words[0] == "lora-jax" else [sys.executable]
    subprocess.run([*program, *words[1:]], cwd=out, check=True)
    return time.perf_counter() - begin


def train(out: Path, name: str, way: list[str], *options: str) -> dict[str, Any]:
    """`lora-jax train`, and what it found."""
    files = ["--model", "base", "--data", "topics.jsonl", "--out", name, "--json", f"{name}.json"]
    seconds = call(out, "lora-jax", "train", *files, *SHAPE, *way, *options)
    found = json.loads((out / f"{name}.json").read_text())
    sizes = {file: (out / name / file).stat().st_size for file in ("adapter.safetensors",)}
    return {"wall_seconds": round(seconds, 1), **found, "bytes": sizes}


def pretrained(out: Path) -> float:
    """Makes base, topics.jsonl and held_out.jsonl; the seconds."""
    return call(out, "python", str(HERE / "pretrain.py"))


def tuned(out: Path) -> None:
    """Perplexity on a part of the topics to train on, for each learning rate."""
    pretrained(out)
    for variant, rates in RATES.items():
        for rate in rates:
            name = f"tune-{NAMES[variant]}-{rate}"
            found = train(out, name, [*WAYS[variant][:-1], rate], "--eval-share", "0.15")
            print(f"{variant} at {rate}: {found['after']['perplexity']:.2f}", flush=True)


def session(out: Path, seeds: range) -> dict[str, Any]:
    """All of it: the base once, LoRA and full fine-tuning for each seed, and what is done with the first adapter."""
    found: dict[str, Any] = {"pretrain": {"wall_seconds": pretrained(out)}}
    for seed in seeds:
        for variant, way in WAYS.items():
            name = NAMES[variant] + (f"-{seed}" if seed else "")
            options = ["--eval-data", "held_out.jsonl", *(["--seed", str(seed)] if seed else [])]
            found.setdefault(variant, []).append(train(out, name, way, *options))
        if not seed:
            merge = ["lora-jax", "merge", "--model", "base", "--adapter", "lora", "--out", "lora-merged"]
            found["merge"] = {"wall_seconds": call(out, *merge)}
            prompt = ["--prompt", 'The "with" statement', "--max-new-tokens", "48"]
            write = ["lora-jax", "generate", "--model", "base", "--adapter", "lora", *prompt]
            found["generate"] = {"wall_seconds": call(out, *write)}
    return found


def table(found: dict[str, Any]) -> str:
    """The README's, in Markdown."""
    lines = ["| | perplexity, held out | trained | optimizer state | adapter | training |", "|---|---|---|---|---|---|"]
    before = found["LoRA"][0]["before"]["perplexity"]
    lines.append(f"| base | {before:.2f} | | | | |")
    for variant, title in TITLES.items():
        runs = found[variant]
        after = [run["after"]["perplexity"] for run in runs]
        spread = f"{statistics.mean(after):.2f} ({min(after):.2f}–{max(after):.2f})"
        trained, size = runs[0]["parameters"], runs[0]["bytes"]["adapter.safetensors"]
        seconds = statistics.median(run["seconds"] for run in runs)
        sizes = f"{2 * 4 * trained / 1e6:.2f} MB | {size / 1e6:.2f} MB"
        lines.append(f"| {title} | {spread} | {trained:,} | {sizes} | {seconds:.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty directory to work in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.tune:
        return tuned(arguments.out)
    found = session(arguments.out, range(arguments.seeds))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "jax": version("jax")}
    (HERE / "results.json").write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()

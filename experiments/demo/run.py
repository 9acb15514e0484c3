"""The demo over several seeds: python experiments/demo/run.py [--full] [SEED ...]; adds to results.json.

As N processes, started as `lora-jax demo` is, each run is one of all of them.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import jax

from lora_jax import distributed
from lora_jax.demo import encoder, job, report

FILE = Path(__file__).parent / "results.json"
MACHINE = f"{os.cpu_count()} CPU cores, {platform.machine()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", metavar="SEED", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="full fine-tuning too")
    arguments = parser.parse_args()
    distributed.initialize()
    pretrained = encoder.load()
    processes = f", {jax.process_count()} processes" * (jax.process_count() > 1)
    with distributed.output(FILE.parent) as folder:
        for seed in arguments.seeds:
            add(folder / FILE.name, f"seed {seed}{processes}", job.Settings(seed=seed, full=arguments.full), pretrained)
        print(table(json.loads((folder / FILE.name).read_text())))


def add(file, title, settings, pretrained):
    """One run, shown and added to the file."""
    with tempfile.TemporaryDirectory() as folder, report.progress() as watch:
        found = job.run(settings, pretrained, Path(folder), watch)
        report.write(found, Path(folder) / "results.json")
        run = json.loads((Path(folder) / "results.json").read_text())
    report.show(found)
    for result in run["results"]:
        del result["losses"]
    runs = json.loads(file.read_text()) if file.exists() else {}
    runs[f"Python {run['versions']['python']}, {title}"] = {"machine": MACHINE, **run}
    file.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def table(runs):
    """The README's: a line for each run, and in each cell accuracy and seconds."""
    names = list(dict.fromkeys(result["name"] for run in runs.values() for result in run["results"]))
    lines = ["| run | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for title, run in runs.items():
        cells = {
            r["name"]: f"{r['accuracy']:.1%}" + f" ({r['seconds']:.0f} s)" * (r["trained"] > 0) for r in run["results"]
        }
        lines.append(f"| {title} | " + " | ".join(cells.get(name, "–") for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

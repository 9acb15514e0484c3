"""All variants on the demo's task: python experiments/variants/run.py [ARM ...]; adds to results.json.

For each arm: its learning rate is chosen on files that are held out of what is trained on, with a seed of its own; then
three seeds are tested.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from arms import ARMS
from training import BATCH, STEPS, begin, stepped, task_of, trained

import lora_jax as lora
from lora_jax.demo import encoder
from lora_jax.demo.batches import draw

FILE = Path(__file__).parent / "results.json"
TUNING, SEEDS = 3, (0, 1, 2)
RATES = [float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3)]


def tuned(run, rates):
    """Validation accuracy by rate: those that are given, and on from the best for as long as it is at an end."""
    found = {rate: run(rate) for rate in rates}
    while True:
        best = max(found, key=found.get)
        places = [RATES.index(rate) for rate in found]
        at = RATES.index(best)
        following = at - 1 if at == min(places) else at + 1 if at == max(places) else None
        if following is None or not 0 <= following < len(RATES):
            return dict(sorted(found.items()))
        found[RATES[following]] = run(RATES[following])


def competed(name, pretrained):
    """An arm's row."""
    arm, began = ARMS[name], time.perf_counter()
    validation = task_of(pretrained, TUNING, tuning=True)
    step, start = stepped(arm, validation)

    def run(task, seed, rate):
        accuracy, losses = trained(arm, task, seed, rate, step, start)
        ends = sum(losses[-20:]) / 20
        print(f"  {name:18} seed {seed} rate {rate:.0e}: {accuracy:.1%}, loss {ends:.3f}", flush=True)
        return accuracy

    rates = tuned(lambda rate: run(validation, TUNING, rate), arm.rates)
    rate = max(rates, key=rates.get)
    accuracies = [run(task_of(pretrained, seed), seed, rate) for seed in SEEDS]
    batches = draw(np.random.default_rng(0), validation.train, BATCH, 4)
    frozen, lora_params = begin(arm, validation, 0, batches)
    return {
        "trained": lora.summary(frozen, lora_params).trained,
        "rate": rate,
        "validation": {f"{rate:.0e}": accuracy for rate, accuracy in rates.items()},
        "accuracy": accuracies,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", metavar="ARM", nargs="*", default=list(ARMS))
    arguments = parser.parse_args()
    pretrained = encoder.load()
    environment = f"Python {platform.python_version()}, JAX {jax.__version__}, {STEPS} steps of {BATCH} sentences"
    for name in arguments.arms:
        row = competed(name, pretrained)
        runs = json.loads(FILE.read_text()) if FILE.exists() else {}  # anew: another process may have added to it
        rows = runs.setdefault(environment, {})
        rows[name] = row
        runs[environment] = {name: rows[name] for name in ARMS if name in rows}
        FILE.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()

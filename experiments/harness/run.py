"""What `make_step` and `fit` cost beside the README's step in a loop: python experiments/harness/run.py [MODEL ...].

Adds to results.json, and prints the README's table.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import training
from lora_jax.demo.task import cross_entropy
from lora_jax.models import bert
from lora_jax.models.classifier import add_head

FILE = Path(__file__).parent / "results.json"
TX = lora.optimizer(optax.adamw(1e-4))
ROUNDS = {"MiniLM's shapes": (6, 20, 120), "a small MLP": (200, 50, 5000)}  # rounds, steps in a block, and pairs
BY_HAND = "by hand"


def minilm():
    """MiniLM-L6's shapes and a head, random weights, all linear layers at rank 8; 16 sentences of 24 tokens."""
    config = bert.Config(30522, 384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    encoder, rng = bert.Bert(config), np.random.default_rng(0)
    model, params = add_head(jax.random.key(0), encoder, encoder.init(jax.random.key(1), jnp.array([[1]])), labels=2)
    batch = {"ids": rng.integers(0, 30522, (16, 24)), "mask": np.ones((16, 24), int), "labels": np.arange(16) % 2}

    def loss_fn(params, batch):
        return cross_entropy(model.apply(params, batch["ids"], batch["mask"]), batch["labels"])

    return loss_fn, params, batch


def mlp():
    """Two layers of width 128, rank 8, 128 examples: what a step costs is mostly that it is a step."""
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(128, 128)) / 16, jnp.float32) for name in ("w", "v")}
    batch = rng.normal(size=(128, 128)).astype(np.float32)
    return lambda params, x: jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2), params, batch


MODELS = {"MiniLM's shapes": minilm, "a small MLP": mlp}


def contenders(loss_fn, frozen, lora_params, batch):
    """By name: what makes a first state, what takes so many steps from one, and what a step compiles to."""

    def objective(lora_params, frozen, batch):
        return lora.lift(loss_fn)(lora.attach(frozen, lora_params), batch)

    def step(lora_params, opt_state, frozen, batch):  # the README's
        loss, grads = jax.value_and_grad(objective)(lora_params, frozen, batch)
        updates, opt_state = TX.update(grads, opt_state, lora_params)
        return optax.apply_updates(lora_params, updates), opt_state, loss

    step, harness = jax.jit(step, donate_argnums=(0, 1)), training.make_step(loss_fn, TX)

    def plain():
        return jax.tree.map(jnp.copy, (lora_params, TX.init(lora_params)))

    def state():
        return training.State.create(jax.random.key(0), lora_params, TX)

    def by_hand(state, steps):
        for batch_ in itertools.repeat(batch, steps):
            *state, _ = step(*state, frozen, batch_)
        return state

    def made(state, steps):
        for batch_ in itertools.repeat(batch, steps):
            state, _ = harness(state, frozen, batch_)
        return state

    def fitted(state, steps):
        return training.fit(harness, state, frozen, itertools.repeat(batch), steps=steps)

    def pairs(count):
        """A step by hand, a step of `fit`'s, each waited for, and so on: seconds by the wall and of the CPU."""
        times = {BY_HAND: {"wall": [], "CPU": []}, "fit": {"wall": [], "CPU": []}}

        def data():
            state, began = plain(), None
            while True:
                if began:
                    noted(times["fit"], began)
                began = time.perf_counter(), time.process_time()
                state = jax.block_until_ready(by_hand(state, 1))
                noted(times[BY_HAND], began)
                began = time.perf_counter(), time.process_time()
                yield batch

        wait = [lambda step, state, metrics: jax.block_until_ready(state) and None]
        training.fit(harness, state(), frozen, data(), steps=count + 2, hooks=wait)
        return {one: {clock: x[1 : count + 1] for clock, x in clocks.items()} for one, clocks in times.items()}

    costs = {"by hand": step.lower(*plain(), frozen, batch), "make_step": harness.lower(state(), frozen, batch)}
    return (
        {
            BY_HAND: (plain, by_hand),
            "make_step": (state, made),
            "fit": (state, fitted),
        },
        pairs,
        {name: lowered.compile().cost_analysis() for name, lowered in costs.items()},
    )


def noted(clocks, began):
    clocks["wall"].append(time.perf_counter() - began[0])
    clocks["CPU"].append(time.process_time() - began[1])


def measured(name):
    """Blocks of steps in turn, each round in another order: seconds a step, by the wall and of the CPU."""
    loss_fn, params, batch = MODELS[name]()
    sites = lora.sites(loss_fn, params, batch)

    def rule(path, site):
        return lora.LoRA(rank=8) if site.kind == "linear" and site.max_rank >= 8 else None

    frozen, lora_params = lora.split(jax.random.key(0), params, rule, sites=sites)
    running, pairs, costs = contenders(loss_fn, frozen, lora_params, batch)
    rounds, steps, count = ROUNDS[name]
    times = {one: {"wall": [], "CPU": []} for one in running}
    for i in range(-1, rounds):  # the first compiles
        for one in (list(running) * 2)[i % len(running) :][: len(running)]:
            create, run = running[one]
            state = jax.block_until_ready(create())
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(state, steps))
            if i >= 0:
                noted(times[one], began)
        print(f"{name}, round {i + 1} of {rounds}", file=sys.stderr)
    times = {one: {clock: [x / steps for x in its] for clock, its in clocks.items()} for one, clocks in times.items()}
    singly = pairs(count)
    times |= {f"{one}, steps in turn": clocks for one, clocks in singly.items()}
    return {
        "rounds": rounds,
        "steps in a block": steps,
        "pairs of steps in turn": count,
        "costs": {one: {c: cost[c] for c in ("flops", "bytes accessed")} for one, cost in costs.items()},
        "contenders": {one: summarized(times[one], times[by_hand_of(one)]) for one in times},
    }


def by_hand_of(one):
    return BY_HAND + ", steps in turn" * one.endswith(", steps in turn")


def summarized(times, by_hand):
    """Medians, and of the ratios to the same round's steps by hand the median and where it lies at 95 %."""
    found = {}
    for clock, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, by_hand[clock], strict=True)]
        more = [a - b for a, b in zip(seconds, by_hand[clock], strict=True)]
        found[clock] = {
            "ms a step": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio's interval": interval(ratios),
            "µs more": 1e6 * statistics.median(more),
        }
    return found


def interval(values):
    """Of the median, at 95 %, from order statistics."""
    middle, half = (len(values) - 1) / 2, 0.98 * len(values) ** 0.5
    return [sorted(values)[max(0, min(len(values) - 1, round(middle + side * half)))] for side in (-1, 1)]


def table(results):
    lines = [
        "| model | loop | ms a step | time over by hand | CPU time over by hand | FLOPs | bytes |",
        "|---" * 7 + "|",
    ]
    for title, found in results.items():
        for one, clocks in found["contenders"].items():
            cells = [title, one, f"{clocks['wall']['ms a step']:.3g}"]
            for clock in ("wall", "CPU"):
                low, high = clocks[clock]["ratio's interval"]
                cells.append(f"{clocks[clock]['ratio']:.3f} ({low:.3f}–{high:.3f})" if one != by_hand_of(one) else "1")
            costs = found["costs"].get(one, {})
            cells += [
                f"{costs[c] / found['costs'][BY_HAND][c]:.5f}" if costs else "" for c in ("flops", "bytes accessed")
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    machine = (
        f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, JAX {jax.__version__}"
    )
    for name in parser.parse_args().models:
        results[name] = {"machine": machine, **measured(name)}
        FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

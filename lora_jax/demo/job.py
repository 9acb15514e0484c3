"""The demo's job: give each contender the same data, train what its rules say, and see how far it gets."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax import tree
from lora_jax.demo.corpus import Example
from lora_jax.models.classifier import Classifier, mean_pool

LENGTHS = (16, 24, 48)  # tokens; a batch is padded to the first that fits, and each compiles once
HEAD = r".*/head/.*"


class Contender(NamedTuple):
    """What trains, given a rank, and how fast."""

    name: str
    rules: Callable[[int], Any]
    learning_rate: float


def query_and_value(rank: int) -> Any:
    return {r".*/(query|value)/kernel": lora.LoRA(rank), HEAD: lora.Full()}


def all_linear(rank: int) -> Any:
    def rule(path: str, site: lora.Site) -> lora.Variant | None:
        if "/head/" in path:
            return lora.Full()
        return lora.LoRA(rank) if site.kind == "linear" else None

    return rule


def everything(rank: int) -> Any:
    return {".*": lora.Full()}


QV = Contender("LoRA on query and value", query_and_value, 2e-3)
ALL = Contender("LoRA on all linear layers", all_linear, 2e-3)
FULL = Contender("full fine-tuning", everything, 2e-4)


class Bucket(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


def encode(tokenizer, examples):
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    ids = [e.ids for e in tokenizer.encode_batch([e.text for e in examples])]
    size = np.array([len(i) for i in ids])
    labels = np.array([e.swapped for e in examples], np.int32)
    out = []
    for lo, hi in zip((0, *LENGTHS), LENGTHS):
        rows = np.flatnonzero((size > lo) & (size <= hi))
        a = np.zeros((len(rows), hi), np.int32)
        m = np.zeros((len(rows), hi), np.int32)
        for k, r in enumerate(rows):
            a[k, : size[r]] = ids[r]
            m[k, : size[r]] = 1
        out.append(Bucket(a, m, labels[rows], rows))
    return out


def batches(rng, buckets, size, steps):
    made = 0
    while True:
        chunks = []
        for b in buckets:
            order = rng.permutation(len(b.rows))
            chunks += [(b, order[i : i + size]) for i in range(0, len(order) - size + 1, size)]
        for j in rng.permutation(len(chunks)):
            b, pick = chunks[j]
            if made == steps:
                return
            made += 1
            yield {"input_ids": b.ids[pick], "attention_mask": b.mask[pick], "labels": b.labels[pick]}


def train(key, contender, loss_fn, params, data, steps, rank, on_step=lambda *_: None):
    data = iter(data)
    first = next(data)
    sites = lora.sites(loss_fn, params, first)
    frozen, lp = lora.split(key, params, contender.rules(rank), sites=sites)
    sched = optax.warmup_cosine_decay_schedule(0.0, contender.learning_rate, steps // 10, steps)
    tx = lora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(sched)))
    st = tx.init(lp)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lp, st, frozen, batch):
        def objective(lp):
            return lora.lift(loss_fn)(lora.attach(frozen, lp), batch)

        loss, g = jax.value_and_grad(objective)(lp)
        u, st = tx.update(g, st, lp)
        return optax.apply_updates(lp, u), st, loss

    losses = []
    import itertools

    for i, b in enumerate(itertools.chain([first], data)):
        lp, st, loss = step(lp, st, frozen, b)
        losses.append(float(loss))
        on_step(i, losses[-1])
    return frozen, lp, st, losses

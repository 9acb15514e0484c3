"""Pretrains a small Llama, and writes what to fine-tune it on: python experiments/session/pretrain.py [--out DIR].

Writes base/, a Hugging Face directory; topics.jsonl, text to adapt it to; and held_out.jsonl, text to measure it on.
The base reads docstrings of Python's standard library, the adapter the topics of `help()`, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from lora_jax import models
from lora_jax.demo import corpus
from lora_jax.models.llama import Config, Llama

BEGIN, END = "<s>", "</s>"  # tokens 0 and 1
VOCABULARY, LENGTH, BATCH, STEPS, PEAK = 1024, 128, 4, 1600, 3e-3
CONFIG = Config(
    VOCABULARY,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=344,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


def split() -> tuple[list[str], list[str]]:
    """Topics to adapt to, and topics held out: an eighth of the names, by a hash, so that all Pythons agree on which.

    Topics quote each other at length: "compound" has all of "with". Each paragraph is kept once, held out if it can be.
    """
    held = {name: hashlib.sha256(name.encode()).digest()[0] < 32 for name in sorted(topics)}
    kept: dict[str, str] = {}
    parts = []
    for part in (True, False):
        texts = []
        for name in (name for name in held if held[name] == part):
            own = {" ".join(text.split()): text for text in re.split(r"\n\s*\n", topics[name].strip())}
            new = {words: text for words, text in own.items() if words not in kept}
            kept |= new
            texts += ["\n\n".join(new.values())] if new else []
        parts.append(texts)
    return parts[1], parts[0]


def tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE, whose tokens are those of the texts."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": VOCABULARY, "special_tokens": [BEGIN, END], "initial_alphabet": alphabet}
    made.train_from_iterator(texts, trainers.BpeTrainer(**options, show_progress=False))
    return made


def pretrain(rows: np.ndarray, seed: int, steps: int) -> tuple[Llama, Any]:
    """A Llama that has seen `steps` batches of rows [N, LENGTH], in an order drawn from the seed."""
    model, rng = Llama(CONFIG), np.random.default_rng(seed)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"A Llama of {count:,} parameters; {steps:,} steps of {BATCH * LENGTH:,} tokens", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, ids: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda params: model.apply(params, ids, method="loss"))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, begin = tx.init(params), time.perf_counter()
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * BATCH // len(rows)))])
    for number in range(steps):
        ids = rows[order[number * BATCH : (number + 1) * BATCH]]
        params, opt_state, loss = step(params, opt_state, ids)
        if (number + 1) % 100 == 0:
            print(f"step {number + 1:5}: loss {loss:.2f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return model, params


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="where to write (default: here)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in zip(("topics", "held_out"), split(), strict=True):
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        print(f"{out / name}.jsonl: {len(texts)} topics, {sum(map(len, texts)):,} characters")

    texts = [text for file, text in corpus.documents() if not file.startswith("pydoc_data/")]
    encoder = tokenizer(texts)
    ids = np.concatenate([np.array([*encoding.ids, 1], np.int32) for encoding in encoder.encode_batch(texts)])
    print(f"To pretrain on: {len(texts):,} docstrings, {len(ids):,} tokens of {VOCABULARY:,} kinds")
    model, params = pretrain(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH), arguments.seed, arguments.steps)

    base = models.save(out / "base", model, params)
    special = {"bos_token": BEGIN, "eos_token": END}
    config = json.loads((base / "config.json").read_text())
    write(base / "config.json", config | {"bos_token_id": 0, "eos_token_id": 1})
    write(base / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    encoder.save(str(base / "tokenizer.json"))
    print(f"{base}/: {', '.join(sorted(file.name for file in base.iterdir()))}")


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

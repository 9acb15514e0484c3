"""A directory of a tiny Llama with a tokenizer of a word a token, and files of data for it."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax import models
from lora_jax.models.llama import Config, Llama

WORDS = [f"w{i}" for i in range(60)]


def base(folder: Path) -> Path:
    """The directory; its embeddings are tied, and it ends texts with token 1."""
    config = Config(
        64, 16, 2, num_attention_heads=2, intermediate_size=32, num_key_value_heads=2, max_position_embeddings=32
    )
    model = Llama(config)
    models.save(folder, model, jax.jit(model.init)(jax.random.key(0), jnp.array([[1]])))
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "<a>", "<b>", *WORDS])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.save(str(folder / "tokenizer.json"))
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "eos_token_id": 1}))
    return folder


def texts(file: Path, number: int = 60) -> Path:
    """Lines of JSON, each a text in which every word but the first follows from the one before."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(number):
        start, step = rng.integers(60), rng.integers(1, 3)
        lines.append(json.dumps({"text": " ".join(WORDS[(start + step * i) % 60] for i in range(20))}))
    file.write_text("\n".join(lines) + "\n")
    return file

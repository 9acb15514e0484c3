"""The models, as functions of (dense, params, batch): `dense(p, x)` is what each contender has for x·W + b.

Layers are unrolled, weights are random, and the shapes are those of the models named.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ATTENTION, QV = ("q", "k", "v", "o"), ("q", "v")


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder or an encoder, and the batch that it is trained on.

    Attributes:
      layers: How many.
      width: Of the residual stream.
      heads: Of queries.
      kv_heads: Of keys and values.
      hidden: Of the MLP.
      batch: Sequences.
      length: Of each.
      vocab: How many tokens there are; 0 for a model of hidden states.
      gated: A gated MLP with SiLU, RMS norms, rotated queries and keys and no biases, as Llama has; or GELU, layer
        norms and biases.
      causal: Whether each position sees the earlier ones alone, and predicts the next token by the tied embedding.
      patch: Pixels of a patch, of an encoder of images.
      dtype: Of the weights.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    batch: int
    length: int
    vocab: int = 0
    gated: bool = False
    causal: bool = True
    patch: int = 0
    dtype: str = "float32"

    @property
    def linear(self):
        """The names of a layer's weights."""
        return (*ATTENTION, "gate", "up", "down") if self.gated else (*ATTENTION, "up", "down")

    def params(self, normal=None):
        """Weights, by default random and on the device; or as `normal`, of a shape, makes the large ones."""
        rng, d = np.random.default_rng(0), self.width
        inner = d // self.heads * self.kv_heads
        shapes = {"q": (d, d), "k": (d, inner), "v": (d, inner), "o": (d, d)}
        shapes |= {"gate": (d, self.hidden), "up": (d, self.hidden), "down": (self.hidden, d)}

        def drawn(*shape):
            return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), self.dtype)

        normal = normal or drawn

        def dense(shape):
            return {"kernel": normal(*shape)} | ({} if self.gated else {"bias": jnp.zeros(shape[1], self.dtype)})

        def norm():
            return {"scale": jnp.ones(d, self.dtype)} | ({} if self.gated else {"bias": jnp.zeros(d, self.dtype)})

        def layer():
            return {name: dense(shapes[name]) for name in self.linear} | {"norm1": norm(), "norm2": norm()}

        params = {"layers": [layer() for _ in range(self.layers)], "norm": norm()}
        if self.vocab:
            params |= {"embed": normal(self.vocab, d), "positions": normal(self.length, d)}
        if self.patch:
            params |= {"patches": normal(3 * self.patch**2, d), "positions": normal(self.length, d)}
        return params if self.causal else params | {"head": normal(d, 2)}

    def data(self):
        """A batch: tokens, patches or hidden states."""
        rng, shape = np.random.default_rng(1), (self.batch, self.length)
        if self.vocab:
            return jnp.asarray(rng.integers(0, self.vocab, shape), jnp.int32)
        width = 3 * self.patch**2 if self.patch else self.width
        return jnp.asarray(rng.standard_normal((*shape, width), np.float32), self.dtype)

    def loss(self, dense, kept=lambda layer: layer, next_token=None):
        """The loss of (params, batch), with `kept` around each layer and `next_token` for the logits' part of it.

        Where the layers' weights are stacked, a scan runs over them.
        """

        def loss(params, batch):
            x = params["embed"][batch] if self.vocab else batch
            x = x @ params["patches"] if self.patch else x
            x = x + params["positions"] if "positions" in params else x
            layer = kept(lambda x, p: (self.layer(dense, p, x), None))
            if isinstance(params["layers"], list):
                for p in params["layers"]:
                    x, _ = layer(x, p)
            else:
                x, _ = jax.lax.scan(layer, x, params["layers"])
            x = self.normalized(params["norm"], x)
            if not self.causal:
                return jnp.mean(jax.nn.softplus(x.mean(1) @ params["head"]).astype(jnp.float32))
            if not self.vocab:
                return jnp.mean(jnp.square(x.astype(jnp.float32)))
            return (next_token or whole)(x[:, :-1], params["embed"].T, batch[:, 1:])

        return loss

    def layer(self, dense, p, x):
        """One block: attention and MLP, each on normalized input."""
        h = self.normalized(p["norm1"], x)
        q, k, v = (dense(p[name], h).reshape(*x.shape[:2], -1, self.width // self.heads) for name in "qkv")
        if self.gated:
            q, k = rotated(q), rotated(k)
        x = x + dense(p["o"], self.attention(q, k, v).reshape(x.shape))
        h = self.normalized(p["norm2"], x)
        act = jax.nn.silu(dense(p["gate"], h)) * dense(p["up"], h) if self.gated else jax.nn.gelu(dense(p["up"], h))
        return x + dense(p["down"], act)

    def attention(self, q, k, v):
        """Softmax attention, (batch, length, heads, size) each; cuDNN's on a GPU."""
        if jax.default_backend() == "gpu":
            return jax.nn.dot_product_attention(q, k, v, is_causal=self.causal, implementation="cudnn")
        k, v = (jnp.repeat(x, self.heads // self.kv_heads, 2) for x in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
        if self.causal:
            scores = scores + jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), 0.0, -1e9).astype(scores.dtype)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)

    def normalized(self, p, x):
        """Layer norm, or RMS norm."""
        wide = x.astype(jnp.float32)
        wide = wide if self.gated else wide - wide.mean(-1, keepdims=True)
        y = (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype) * p["scale"]
        return y if self.gated else y + p["bias"]


def whole(x, head, labels):
    """The cross-entropy, of all logits at once."""
    logits = (x @ head).astype(jnp.float32)
    right = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - right)


def rotated(x):
    """Rotary positions."""
    length, size = x.shape[1], x.shape[-1]
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, size, 2) / size)
    cos, sin = (jnp.asarray(f(angles), x.dtype)[None, :, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


MODELS = {
    "gpt2": Transformer(12, 768, 12, 12, 3072, batch=2, length=256, vocab=50257),
    "minilm": Transformer(6, 384, 12, 12, 1536, batch=32, length=64, vocab=30522, causal=False),
    "llama_block": Transformer(1, 4096, 32, 8, 14336, batch=1, length=512, gated=True),
    "vit": Transformer(12, 384, 6, 6, 1536, batch=4, length=196, patch=16, causal=False),  # ViT-S/16
    "tiny": Transformer(2, 64, 4, 2, 128, batch=2, length=16, vocab=101, gated=True),
}
TARGETS = {"qv_r8": (QV, 8), "all_r16": (None, 16)}


def plain(p, x):
    """x·W + b."""
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


@dataclasses.dataclass(frozen=True)
class Task:
    """What a contender trains.

    Attributes:
      model: A model.
      batch: Its data.
      names: The weights of each layer that are adapted.
      rank: The rank.
      loss: From `dense` to the loss of (params, batch).
    """

    model: Transformer
    batch: jax.Array
    names: tuple[str, ...]
    rank: int
    loss: Any

    @classmethod
    def of(cls, model, targets, **recipes):
        names, rank = TARGETS[targets]
        return cls(model, model.data(), names or model.linear, rank, functools.partial(model.loss, **recipes))

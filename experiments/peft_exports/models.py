"""Models in PyTorch and the same in JAX, with the name maps between them, and their inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_jax import tree
from lora_jax.formats.layouts import restore
from lora_jax.formats.names import Names, locate
from lora_jax.models import bert, classifier, gpt2, llama


class Model(NamedTuple):
    """A model twice.

    Attributes:
      torch: PyTorch's module.
      function: The same function of parameters and inputs, for `lora_jax.lift`.
      params: Its parameters.
      names: The name map.
      inputs: For both, as a NumPy array.
    """

    torch: torch.nn.Module
    function: Callable[[Any, Any], jax.Array]
    params: dict[str, Any]
    names: Names
    inputs: np.ndarray


class Convolutions(torch.nn.Module):
    """Of images and, of what these make, of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = torch.nn.Conv2d(8, 12, (3, 2), padding=(0, 1), bias=False)
        self.third = torch.nn.Conv1d(12, 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, 4, 8, 8]."""
        x = torch.nn.functional.silu(self.first(x))
        return self.third(torch.nn.functional.silu(self.second(x)).flatten(2))


def convolutions(params: Any, images: jax.Array) -> jax.Array:
    """The same; images as PyTorch has them."""

    def conv(name: str, x: jax.Array, stride: int, padding: Any) -> jax.Array:
        own = params[name]
        layout = ("NCHW", "HWIO", "NCHW") if x.ndim == 4 else ("NCW", "WIO", "NCW")
        strides = (stride,) * (x.ndim - 2)
        y = lax.conv_general_dilated(x, own["kernel"], strides, padding, dimension_numbers=layout)
        return y + own["bias"].reshape(1, -1, *(1,) * (x.ndim - 2)) if "bias" in own else y

    x = jax.nn.silu(conv("first", images, 2, [(1, 1), (1, 1)]))
    x = jax.nn.silu(conv("second", x, 1, [(0, 0), (1, 1)]))
    return conv("third", x.reshape(*x.shape[:2], -1), 1, [(0, 0)])


class Experts(torch.nn.Module):
    """Experts whose weights are parameters of one module, (expert, out, in), or (expert, in, out) if transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        gate_up, down = torch.randn(3, 20, 6) / 6**0.5, torch.randn(3, 8, 10) / 10**0.5
        self.gate_up_proj = torch.nn.Parameter(gate_up.mT.contiguous() if transposed else gate_up)
        self.down_proj = torch.nn.Parameter(down.mT.contiguous() if transposed else down)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """From [B, 6] to [B, 8]."""
        axes = "eio" if hasattr(self, "is_transposed") else "eoi"
        gate, up = torch.einsum(f"bi,{axes}->beo", x, self.gate_up_proj).chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up * weights[..., None]
        return torch.einsum(f"bei,{axes}->bo", h, self.down_proj)


class Mixture(torch.nn.Module):
    """A router and its experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.router = torch.nn.Linear(6, 3, bias=False)
        self.experts = Experts(transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, 6] to [B, 8]."""
        return self.experts(x, self.router(x).softmax(-1))


def mixture(params: Any, x: jax.Array) -> jax.Array:
    """The same; gate and up are two leaves of ours, and one tensor of theirs."""
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    h = jax.nn.silu(jnp.einsum("bi,eio->beo", x, gate)) * jnp.einsum("bi,eio->beo", x, up)
    h *= jax.nn.softmax(x @ params["router"]["kernel"])[..., None]
    return jnp.einsum("bei,eio->beo", h, down).sum(1)


class Attention(torch.nn.Module):
    """Queries, keys and values: of the first they are one module, of the second three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = torch.nn.Linear(8, 24)
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From [B, 8] to [B, 8]."""
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        x = x + torch.softmax(q * k, -1) * v
        return torch.softmax(self.q_proj(x) * self.k_proj(x), -1) * self.v_proj(x)


def attention(params: Any, x: jax.Array) -> jax.Array:
    """The same; of the first there are three leaves, and of the second one, (in, 3, out)."""
    q, k, v = (x @ params[name]["kernel"] + params[name]["bias"] for name in "qkv")
    x = x + jax.nn.softmax(q * k) * v
    parts = jnp.einsum("bi,ipo->bpo", x, params["parts"]["kernel"]) + params["parts"]["bias"]
    return jax.nn.softmax(parts[:, 0] * parts[:, 1]) * parts[:, 2]


def _experts(kind: str) -> Names:
    return [
        ("router", "router", "linear"),
        ("gate", "experts.gate_up_proj[0]", kind),
        ("up", "experts.gate_up_proj[1]", kind),
        ("down", "experts.down_proj", kind),
    ]


NAMES: dict[str, Names] = {
    "conv": [("first|second", r"\g<0>", "conv"), ("third", "third", "conv: width in out -> out in width")],
    "moe": _experts("experts"),
    "transposed moe": _experts("transposed_experts"),
    "fused": [
        ("q", "qkv_proj[0]", "linear"),
        ("k", "qkv_proj[1]", "linear"),
        ("v", "qkv_proj[2]", "linear"),
        ("parts", "{part:q_proj,k_proj,v_proj}", "linear: in part out -> out in"),
    ],
}
SHAPES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "conv": {
        "first": {"kernel": (3, 3, 4, 8), "bias": (8,)},
        "second": {"kernel": (3, 2, 8, 12)},
        "third": {"kernel": (3, 12, 6), "bias": (6,)},
    },
    "moe": {
        "router": {"kernel": (6, 3)},
        **{name: {"kernel": (3, 6, 10)} for name in ("gate", "up")},
        "down": {"kernel": (3, 10, 8)},
    },
    "fused": {
        **{name: {"kernel": (8, 8), "bias": (8,)} for name in "qkv"},
        "parts": {"kernel": (8, 3, 8), "bias": (3, 8)},
    },
}
SHAPES["transposed moe"] = SHAPES["moe"]


@functools.cache
def model(name: str) -> Model:
    """A model by its name."""
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(48, size=(2, 8))
    if name in ("llama", "tied", "llama unscanned"):
        sizes = {
            "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "mlp_bias": True,
            "tie_word_embeddings": name == "tied",
        }  # fmt: skip
        theirs = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
        ours = llama.Llama(llama.Config(**sizes), scan=name != "llama unscanned")
        return _decoder(theirs, ours, llama.NAMES, tokens)
    if name == "gpt2":
        config = GPT2Config(vocab_size=48, n_embd=24, n_layer=2, n_head=4, n_positions=16, attn_implementation="eager")
        ours = gpt2.GPT2(gpt2.Config(48, 24, 2, 4, max_position_embeddings=16))
        return _decoder(GPT2LMHeadModel(config), ours, gpt2.NAMES, tokens)
    if name == "bert classifier":
        sizes = {
            "vocab_size": 48, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 16,
        }  # fmt: skip
        theirs = BertForSequenceClassification(BertConfig(**sizes, num_labels=3, attn_implementation="eager"))
        ours = classifier.Classifier(bert.Config(**sizes), labels=("a", "b", "c"))
        return _decoder(theirs, ours, classifier.NAMES, tokens)
    made = {
        "conv": (Convolutions, convolutions, (4, 4, 8, 8)),
        "moe": (Mixture, mixture, (5, 6)),
        "transposed moe": (functools.partial(Mixture, True), mixture, (5, 6)),
        "fused": (Attention, attention, (5, 8)),
    }
    make, function, shape = made[name]
    theirs = make()
    shapes = {
        module: {last: jax.ShapeDtypeStruct(own, "float32") for last, own in parts.items()}
        for module, parts in SHAPES[name].items()
    }
    inputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return Model(theirs.eval(), function, filled(shapes, theirs, NAMES[name]), NAMES[name], inputs)


def _decoder(theirs: Any, ours: Any, names: Names, tokens: np.ndarray) -> Model:
    randomize(theirs)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), tokens)
    return Model(theirs.eval(), ours.apply, filled(shapes, theirs, names), names, tokens)


def randomize(module: torch.nn.Module) -> None:
    """Weights and biases, all of them random, in place."""
    with torch.no_grad():
        for name, x in module.named_parameters():
            table = x.ndim == 1 or "wte" in name
            x.add_(torch.randn_like(x) * (0.3 if table else x.shape[-1] ** -0.5))


def filled(shapes: Any, module: torch.nn.Module, names: Names) -> Any:
    """Our parameters, from a module's."""
    leaves, treedef = tree.flatten(shapes)
    state, found = module.state_dict(), {}
    for path, place in locate(leaves, names).items():
        inside, parts = [axis for axis in place.axes if axis not in place.stacked], []
        for name in place.tensors.values():
            x = state[name].numpy()
            if place.part is not None:
                dim = place.groups.index(place.layout.side("o")[0])
                x = x.take(range(*place.part[:2]), axis=dim)
            parts.append(restore(x, place.groups, inside, place.sizes))
        order = [*place.stacked, *inside]
        x = np.stack(parts).reshape(*(place.sizes[axis] for axis in place.stacked), *parts[0].shape)
        found[path] = jnp.asarray(x.transpose([order.index(axis) for axis in place.axes]))
    return tree.unflatten(treedef, {path: found[path] for path in leaves})

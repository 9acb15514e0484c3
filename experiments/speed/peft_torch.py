"""PEFT on PyTorch beside PyTorch's own full fine-tuning, for GPT-2's shapes: python experiments/speed/peft_torch.py.

The same shapes, batch and optimizer as `run.py --models gpt2` has, in a process of its own: it writes peft_torch.json.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import peft
import torch
from torch import nn
from torch.nn import functional

FILE = Path(__file__).parent / "peft_torch.json"
LAYERS, WIDTH, HEADS, HIDDEN, BATCH, LENGTH, VOCAB = 12, 768, 12, 3072, 2, 256, 50257
TARGETS = {"qv_r8": (("q", "v"), 8), "all_r16": (("q", "k", "v", "o", "up", "down"), 16)}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions.weight
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x)[:, :-1] @ self.embed.weight.T
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build(targets):
    """A model, whole or with PEFT's LoRA, and what one step on a batch is."""
    torch.manual_seed(0)
    model = Model()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    if targets:
        names, rank = TARGETS[targets]
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names)))
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, 1e-4)

    def step(tokens):
        loss = model(tokens)
        loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(p.numel() for p in trained)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    runs = {name: build(None if name == "full fine-tuning" else name) for name in ("full fine-tuning", *TARGETS)}
    times, losses = {name: [] for name in runs}, {}
    for i in range(steps + 2):
        for name, (step, _) in runs.items():
            began = time.perf_counter()
            losses[name] = step(tokens)
            if i > 1:  # two steps to warm up
                times[name].append(time.perf_counter() - began)
    rows = {}
    for name, (_, trained) in runs.items():
        ratios = [own / full for own, full in zip(times[name], times["full fine-tuning"], strict=True)]
        low, middle, high = (round(x, 4) for x in statistics.quantiles(ratios, n=4))
        step_s = round(statistics.median(times[name]), 4)
        rows[name] = {
            "trained": trained,
            "step_s": step_s,
            "ratio": middle,
            "quartiles": [low, high],
            "loss": losses[name],
        }
        print(f"{name:18} {step_s:.3f} s  × {middle:.3f} ({low:.3f} to {high:.3f})  loss {losses[name]:.4f}")
    environment = f"Python {platform.python_version()}, PyTorch {torch.__version__}, PEFT {peft.__version__}"
    FILE.write_text(
        json.dumps(
            {"environment": f"{environment}, {os.cpu_count()} CPU cores", "steps": steps, "rows": rows}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

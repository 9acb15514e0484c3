"""Do Hugging Face PEFT's models with our exported adapters compute what ours do? Writes results.json and results.md."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from models import Model, model

import lora_jax as lora
from lora_jax.formats.peft import save

HERE = Path(__file__).parent
LINEAR = r".*/(query|key|value|output|gate|up|down|head)/kernel"
TABLES = r".*/embeddings/embedding"
GPT2 = r".*/(qkv|output|up|down)/kernel"
FULL = lora.Full()


class Case(NamedTuple):
    """An adapter to export.

    Attributes:
      model: The model's name.
      rules: As `lora_jax.split` takes them.
      options: Of `save`.
      change: What is done to the random adapters before they are saved: (frozen, lora_params) to both.
    """

    model: str
    rules: dict[str, Any]
    options: dict[str, Any] = {}
    change: Callable[[Model, Any, Any], tuple[Any, Any]] = lambda model, frozen, lora_params: (frozen, lora_params)


def pruned(model: Model, frozen: Any, lora_params: Any) -> tuple[Any, Any]:
    """AdaLoRA's with ranks that are zero."""

    def of(adapter: lora.Adapter) -> lora.Adapter:
        factors = {**adapter.factors}
        for name, axis in (("A", -1), ("E", -1), ("B", -2)):
            gone = jnp.arange(factors[name].shape[axis]).reshape(-1, *(1,) * (-axis - 1)) == 1
            factors[name] = jnp.where(gone, 0, factors[name])
        return lora.Adapter(factors, adapter.variant, adapter.site)

    return frozen, {path: of(adapter) for path, adapter in lora_params.items()}


def relative(model: Model, frozen: Any, lora_params: Any) -> tuple[Any, Any]:
    """Adapters of the base as it was."""
    return model.params, lora.relative_to(model.params, frozen, lora_params)


def cases() -> dict[str, Case]:
    """By what they show."""
    four = lora.LoRA(4, 6)
    stabilized = lora.LoRA(4, 6, "rank_stabilized")
    several = {r".*/query/kernel": lora.LoRA(3, 2), r".*/(key|up)/kernel": lora.LoRA(2, 9), r".*/down/kernel": four}
    mixed = {r".*/query/kernel": stabilized, r".*/key/kernel": lora.LoRA(2, 5)}
    conv, each = r"(first|second|third)/kernel", lora.LoRA(2, 3).at(batch_axes=0, in_axes=1, out_axes=2)
    return {
        "Linear": Case("llama", {LINEAR: four}),
        "Linear, without a base": Case("llama", {LINEAR: four}, {"base": None}),
        "Linear, not scanned": Case("llama unscanned", {r".*/layers_1/.*/(query|up)/kernel": four}),
        "rsLoRA": Case("llama", {LINEAR: stabilized}),
        "ranks and alphas by path": Case("llama", several),
        "both scalings": Case("llama", mixed),
        "LoRA-FA": Case("llama", {LINEAR: lora.LoRAFA(4, 6)}),
        "LoRA-XS, as LoRA": Case("llama", {LINEAR: lora.LoRAXS(4, 6)}),
        "PiSSA, by relative_to": Case("llama", {LINEAR: lora.LoRA(4, 6, init="pissa")}, {}, relative),
        "bfloat16 factors": Case("llama", {LINEAR: lora.LoRA(4, 6, dtype="bfloat16")}),
        "DoRA": Case("llama", {LINEAR: lora.DoRA(4, 6)}),
        "Conv1D": Case("gpt2", {GPT2: four}),
        "Conv1D, DoRA": Case("gpt2", {GPT2: lora.DoRA(4, 6, "rank_stabilized")}),
        "Conv1d and Conv2d": Case("conv", {conv: lora.LoRA(2, 3)}),
        "Conv1d and Conv2d, DoRA": Case("conv", {conv: lora.DoRA(2, 3)}),
        "Embedding": Case("llama", {TABLES: four, r".*/head/kernel": four}),
        "Embedding, DoRA": Case("llama", {TABLES: lora.DoRA(4, 6)}),
        "tied table and head": Case("tied", {TABLES: stabilized}),
        "tied table and head, Full": Case("tied", {TABLES: FULL, LINEAR: four}),
        "tied table and head, GPT-2": Case("gpt2", {TABLES: four, GPT2: four}),
        "modules_to_save": Case("llama", {r".*norm/scale|.*/head/kernel": FULL, r".*/query/kernel": four}),
        "modules_to_save, weight alone": Case("llama", {r".*/layers/mlp/up/kernel": FULL, r".*/query/kernel": four}),
        "modules_to_save alone": Case("gpt2", {r".*/last_norm/.*": FULL}),
        "biases of adapted layers": Case("gpt2", {r".*/qkv/bias": FULL, r".*/qkv/kernel": four}),
        "biases": Case("gpt2", {r".*/(up|attention_norm)/bias": FULL, r".*/qkv/kernel": four}),
        "classifier": Case("bert classifier", {r".*/(head|pooler)/.*": FULL, r".*/(query|value|up)/kernel": four}),
        "classifier, SEQ_CLS": Case(
            "bert classifier", {r".*/head/.*": FULL, r".*/query/kernel": four}, {"task_type": "SEQ_CLS"}
        ),
        "experts": Case("moe", {"router/kernel": lora.LoRA(2, 3), "(gate|up|down)/kernel": each}),
        "experts, one parameter": Case("moe", {"down/kernel": each}),
        "experts, is_transposed": Case("transposed moe", {"(gate|up|down)/kernel": each}),
        "experts, Full": Case("moe", {r"down/kernel": FULL, r"router/kernel": lora.LoRA(2, 3)}),
        "fused by them, and by us": Case("fused", {r"(q|k|v|parts)/kernel": lora.LoRA(2, 3)}),
        "fused, in part, of several ranks": Case("fused", {"q/kernel": lora.LoRA(2, 3), "v/kernel": lora.LoRA(3, 5)}),
        "fused, DoRA": Case("fused", {r"(q|k|v|parts)/kernel": lora.DoRA(2, 3)}),
        "VeRA": Case("llama", {r".*/(query|key|down)/kernel": lora.VeRA(6)}),
        "VeRA, Conv1D": Case("gpt2", {r".*/(qkv|up)/kernel": lora.VeRA(6)}),
        "LoHa": Case("llama", {LINEAR: lora.LoHa(3, 5)}),
        "LoHa, Conv1d and Conv2d": Case("conv", {conv: lora.LoHa(3, 5)}),
        "LoKr": Case("llama", {LINEAR: lora.LoKr(1, 2, decompose_both=True)}),
        "LoKr, Conv1d and Conv2d": Case("conv", {conv: lora.LoKr(1, 2)}),
        "IA³": Case("llama", {r".*/(key|value)/kernel": lora.IA3(), r".*/down/kernel": lora.IA3("in")}),
        "IA³, Conv2d": Case("conv", {"second/kernel": lora.IA3()}),
        "AdaLoRA": Case("llama", {LINEAR: lora.AdaLoRA(4, 6)}),
        "AdaLoRA, pruned": Case("llama", {LINEAR: lora.AdaLoRA(4, 6)}, {}, pruned),
        "AdaLoRA, Conv2d": Case("conv", {r"(first|second)/kernel": lora.AdaLoRA(2, 3)}),
        "portable, rsLoRA": Case("llama", {LINEAR: stabilized}, {"portable": True}),
        "portable, ranks and alphas by path": Case("llama", several, {"portable": True}),
        "portable, Conv1D": Case("gpt2", {GPT2: stabilized}, {"portable": True}),
        "portable, fused": Case("fused", {r"(q|k|v|parts)/kernel": lora.LoRA(2, 3)}, {"portable": True}),
        "portable, tied": Case("tied", {TABLES: stabilized, LINEAR: stabilized}, {"portable": True}),
    }


def adapted(of: Model, case: Case) -> tuple[Any, Any]:
    """What is frozen, and random adapters."""

    def function(params: Any) -> jax.Array:
        return of.function(params, of.inputs)

    split = lora.split(jax.random.key(0), of.params, case.rules, sites=lora.sites(function, of.params))
    frozen, lora_params = split
    rng = np.random.default_rng(1)

    def random(path: str, adapter: lora.Adapter) -> lora.Adapter:
        mean = {"magnitude": 1.0, "scale": 1.0}
        drawn = {
            name: jnp.asarray(mean.get(name, 0.0) + 0.2 * rng.standard_normal(x.shape), x.dtype)
            for name, x in adapter.factors.items()
        }
        return lora.Adapter(drawn, adapter.variant, adapter.site)

    return case.change(of, frozen, {path: random(path, adapter) for path, adapter in lora_params.items()})


def theirs(of: Model, directory: Path) -> tuple[np.ndarray, Any]:
    """What PEFT's model computes with a folder, and what it says of loading it."""
    found = []
    load = peft.PeftModel.load_adapter

    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(load(*args, **kwargs))
        return found[-1]

    peft.PeftModel.load_adapter = noted
    try:
        base = copy.deepcopy(of.torch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(base, str(directory)).eval()
    finally:
        peft.PeftModel.load_adapter = load
    with torch.no_grad():
        result = adapted(torch.from_numpy(of.inputs))
    return getattr(result, "logits", result).numpy(), found[0]


def run(name: str, case: Case) -> dict[str, Any]:
    """A case's numbers."""
    of = model(case.model)
    frozen, lora_params = adapted(of, case)
    ours = np.asarray(jax.jit(lora.lift(of.function))(lora.attach(frozen, lora_params), of.inputs))
    plain = np.asarray(jax.jit(of.function)(of.params, of.inputs))
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = {"base": of.params, **case.options}
        directory = save(Path(folder) / "adapter", lora_params, of.names, **options)
        logits, loaded = theirs(of, directory)
        row["moved"] = float(abs(logits - plain).max())
        row["error"] = float(abs(logits - ours).max())
        row["missing"] = len(loaded.missing_keys)
        row["unexpected"] = len(loaded.unexpected_keys)
        if case.options.get("portable"):
            unfolded = save(Path(folder) / "unfolded", lora_params, of.names, base=of.params)
            row["folded"] = float(abs(logits - theirs(of, unfolded)[0]).max())
    return row


def main() -> None:
    """Run all, print them, and write them down."""
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(1)
    rows = {}
    for name, case in cases().items():
        rows[name] = run(name, case)
        print(name, rows[name], flush=True)
    (HERE / "results.json").write_text(json.dumps({"made_with": made_with(), "cases": rows}, indent=1) + "\n")
    lines = [
        "| adapter | logits differ by | keys missing, unexpected | folded and not differ by |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        folded = f"{row['folded']:.1e}" if "folded" in row else ""
        lines.append(f"| {name} | {row['error']:.1e} | {row['missing']}, {row['unexpected']} | {folded} |")
    (HERE / "results.md").write_text("\n".join([made_with(), "", *lines]) + "\n")
    wrong = [name for name, row in rows.items() if not row["error"] < 1e-5 or row["missing"] or row["unexpected"]]
    raise SystemExit(f"off: {', '.join(wrong)}" if wrong else 0)


def made_with() -> str:
    """The versions."""
    return f"JAX {jax.__version__}, PyTorch {torch.__version__.partition('+')[0]}, PEFT {peft.__version__}"


if __name__ == "__main__":
    main()

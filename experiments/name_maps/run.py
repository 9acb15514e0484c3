"""Check the maps against real models, in three steps, each where its library is; see README.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from cases import CASES, inputs, logits

HERE = Path(__file__).parent
FIXTURE = HERE.parents[1] / "tests" / "fixtures" / "name_maps.json"
LATER = re.compile(r"(?:^|[./])(?:layers|h|block|encoder[./]layer)[./]1[./]")  # layers that are as the first


def write_torch(folder: Path) -> None:
    """PyTorch's models with random weights, and their logits."""
    import torch
    import transformers

    for name, case in CASES.items():
        torch.manual_seed(0)
        config = getattr(transformers, case.config)(**case.fields, attn_implementation="eager")
        model = getattr(transformers, case.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            found = logits(model(**{key: torch.tensor(x) for key, x in inputs(case).items()}))
        model.save_pretrained(folder / name)
        shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
        (folder / name / "shapes.json").write_text(json.dumps(shapes))
        np.save(folder / name / "logits.npy", found.numpy())


def check_jax(folder: Path) -> None:
    """The models of Flax and Tunix with those weights, by the maps: paths, shapes, logits; and an adapter, exported."""
    import jax
    import jax.numpy as jnp
    from models import flax_model, tunix_model

    import lora_jax as lora
    from lora_jax import tree
    from lora_jax.formats import huggingface, maps, peft
    from lora_jax.formats.maps import transformers, tunix  # noqa: F401  (imported for its effect: `maps` then has them)
    from lora_jax.formats.names import locate

    results, recorded = {}, {}
    for name, case in CASES.items():
        library = maps.tunix if case.tunix else maps.transformers
        names = getattr(library, case.map)
        call, shapes = (tunix_model if case.tunix else flax_model)(case, folder / name)
        leaves, _ = tree.flatten(shapes)
        places = locate(leaves, names)
        theirs = {key: tuple(shape) for key, shape in json.loads((folder / name / "shapes.json").read_text()).items()}
        ours = {tensor: place.theirs for place in places.values() for tensor in place.tensors.values()}
        heads = {f"{place.tied}.{role}" for place in places.values() if place.tied for role in ("weight", "bias")}
        tables = {key for key in theirs if "shared.weight" in theirs and key.endswith("embed_tokens.weight")}
        tables |= {"lm_head.weight"} if tables and "lm_head.weight" not in ours else set()
        recorded[name] = {
            "map": f"{library.__name__.rpartition('.')[2]}.{case.map}",
            "ours": {path: [*leaf.shape] for path, leaf in leaves.items() if not LATER.search(path)},
            "theirs": {key: [*shape] for key, shape in theirs.items() if not LATER.search(key)},
        }
        params = huggingface.fill(shapes, huggingface.open_checkpoint(folder / name), names)
        expected, batch = np.load(folder / name / "logits.npy"), inputs(case)

        def rules(path, site, places=places):
            # Whisper's forward asks its convolutions for a stride, which PEFT's layers have not.
            known = path in places and not path.startswith("model/encoder/conv")
            return lora.LoRA(rank=2, alpha=6) if known and site.adaptable else None

        sites = {path: place.site() for path, place in places.items()}
        _, lora_params = lora.split(jax.random.key(0), params, rules, sites=sites)
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        lora_params = jax.tree.map(lambda x, keys=keys: 0.1 * jax.random.normal(next(keys), x.shape), lora_params)
        row = {
            "leaves": len(leaves),
            "located": len(places),
            "theirs": len(theirs),
            "theirs without a leaf": sorted(theirs.keys() - ours.keys() - heads - tables),
            "of another shape": sorted(key for key, shape in ours.items() if theirs.get(key) != shape),
            "logits differ by": float(np.abs(call(params, batch) - expected).max()),
            "adapted leaves": len(lora_params),
        }
        try:
            peft.save(folder / name / "adapter", lora_params, names, base=params)
            back = peft.load(folder / name / "adapter", params, names)
            row["adapter comes back"] = jax.tree.structure(back) == jax.tree.structure(lora_params) and all(
                bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (back, lora_params)), strict=True)
            )
            adapted = call(lora.merge(params, lora_params), batch)
            row["adapter changes logits by"] = float(np.abs(adapted - expected).max())
            np.save(folder / name / "adapted.npy", jnp.asarray(adapted))
        except ValueError as error:
            row["adapter"] = str(error)[-300:]
        results[name] = row
        print(name, row, flush=True)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = (f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in recorded.items())
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check_peft(folder: Path) -> None:
    """PEFT's logits with the exported adapters."""
    import torch
    import transformers
    from peft import PeftModel

    results = json.loads((HERE / "results.json").read_text())
    for name, case in CASES.items():
        if not (folder / name / "adapted.npy").exists():
            continue
        model = getattr(transformers, case.model).from_pretrained(folder / name, attn_implementation="eager")
        model = PeftModel.from_pretrained(model, folder / name / "adapter").eval()
        with torch.no_grad():
            found = logits(model(**{key: torch.tensor(x) for key, x in inputs(case).items()})).numpy()
        expected = np.load(folder / name / "adapted.npy")
        results[name]["with the adapter in PEFT, logits differ by"] = float(np.abs(found - expected).max())
        print(name, results[name]["with the adapter in PEFT, logits differ by"], np.abs(expected).max())
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=("torch", "jax", "peft"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE))
    {"torch": write_torch, "jax": check_jax, "peft": check_peft}[arguments.step](arguments.folder)

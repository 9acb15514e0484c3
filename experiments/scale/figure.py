"""The README's tables and figure, of results.json, tpu.json and chips.json: python experiments/scale/figure.py."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import run

from lora_jax.plan.chips import CHIPS

HERE = Path(__file__).parent
NAMES = {"llama-3-8b": "8B", "llama-3-70b": "70B"}
MESHES = {"fsdp n": 1, "fsdp n/8 × tp 8": 8}
PARTS = {"base": "#8d99ae", "factors": "#d1495b", "optimizer": "#edae49"}


def scaled(rows, model, tp, adapted=True):
    """Rows of one model and kind of mesh, by the number of devices."""
    found = [
        row
        for row in rows.values()
        if (row["model"], row["mesh"]["tp"], row["adapted"]) == (model, tp, adapted) and row["devices"] == row["batch"]
    ]
    return sorted((row for row in found if row["remat"] == "products"), key=lambda row: row["devices"])


def tables():
    """All tables of the README, in its order."""
    rows, tpu, chips = (json.loads((HERE / f"{name}.json").read_text()) for name in ("results", "tpu", "chips"))
    return "\n\n".join(["\n".join(table) for table in (plans(rows), by_tpu(rows, tpu), by_chip(chips), grown(rows))])


def head(*names, words):
    return ["| " + " | ".join(names) + " |", "|---" * words + "|---:" * (len(names) - words) + "|"]


def plans(rows):
    parts = ("base", "factors", "optimizer", "a step makes", "together", "of 80 GB")
    yield from head("", "chips", "sequences", "remat", *parts, words=4)
    for model, mesh, batch, remat in run.STATED:
        row = rows[run.name_of(model, mesh, batch, remat, True)]
        held = row["bytes_per_device"]
        sizes = (f"{held[part] / 1e9:.2f}" for part in ("base", "factors", "optimizer", "temporaries"))
        cells = (NAMES[model], str(row["devices"]), str(batch), remat, *sizes, f"**{held['total'] / 1e9:.2f}**")
        yield f"| {' | '.join(cells)} | {held['total'] / 80e9:.0%} |"


def by_tpu(rows, tpu):
    yield from head("", "remat", "a step makes", "together", "peak", "CPU's together", words=2)
    for model, mesh, batch, remat in run.STATED:
        row, found = (
            rows[run.name_of(model, mesh, batch, remat, True)],
            tpu[f"{model}, {mesh}, batch {batch}, remat {remat}"],
        )
        sizes = (*(found[part] for part in ("temporaries", "total", "peak")), row["bytes_per_device"]["total"])
        cells = (f"{NAMES[model]}, {row['devices']} chip{'s' * (row['devices'] > 1)}", remat)
        yield f"| {' | '.join([*cells, *(f'{size / 1e9:.1f}' for size in sizes)])} |"


def by_chip(chips):
    yield from head("", "remat", *(f"{name} {chip.memory / 1e9:.0f} GB" for name, chip in CHIPS.items()), words=2)
    for name, found in chips.items():
        model, remat = name.split(", remat ")
        cells = []
        for chip in CHIPS:
            row, times = found[chip], found[chip]["chips"][chip]
            low, high = (f"{1e3 * times[key]:,.0f}" for key in ("overlapped", "in_turn"))
            size = row["bytes_per_device"]["total"] / 1e9
            cells.append(f"{row['devices']}: {size:.3g} GB, {low if low == high else f'{low} to {high}'} ms")
        yield f"| {NAMES[model]} | {remat} | {' | '.join(cells)} |"


def grown(rows):
    parts = ("base", "factors", "optimizer", "a step makes", "together")
    yield from head("model", "mesh", "devices", *parts, "TFLOP", "frozen", "sent", "frozen", "LoRA adds", words=2)
    for model in run.MODELS:
        for name, tp in MESHES.items():
            pairs = zip(scaled(rows, model, tp), scaled(rows, model, tp, adapted=False), strict=True)
            for row, frozen in pairs:
                held, sent, alone = (
                    row["bytes_per_device"],
                    row["bytes_sent_per_device"],
                    frozen["bytes_sent_per_device"],
                )
                cells = [f"{held[part] / 1e9:.2f}" for part in ("base", "factors", "optimizer", "temporaries", "total")]
                cells += [f"{x['flops_per_device'] / 1e12:.1f}" for x in (row, frozen)]
                cells += [f"{sent / 1e9:.1f}", f"{alone / 1e9:.1f}", f"{sent / alone - 1:.2%}"]
                yield f"| {NAMES[model]} | {name} | {row['devices']} | {' | '.join(cells)} |"


def draw(rows):
    """For each model: what a device holds, and what it sends, as the mesh grows."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4))
    for line, model in zip(axes, run.MODELS, strict=True):
        for axis, (name, tp) in zip(line, MESHES.items(), strict=False):
            found = scaled(rows, model, tp)
            devices = [row["devices"] for row in found]
            for part, color in PARTS.items():
                sizes = [row["bytes_per_device"][part] / 1e9 for row in found]
                axis.loglog(devices, sizes, "o-", color=color, ms=4, label=part)
            axis.set_title(f"{model}, {name}", fontsize=9)
            axis.set_ylabel("GB on each device", fontsize=8)
        for marker, (name, tp) in zip("os", MESHES.items(), strict=True):
            for adapted, color in ((False, "#8d99ae"), (True, "#d1495b")):
                found = scaled(rows, model, tp, adapted)
                sent = [row["bytes_sent_per_device"] / 1e9 for row in found]
                style = "-" if adapted else "--"
                label = f"{name}, {'LoRA' if adapted else 'frozen model alone'}"
                devices = [row["devices"] for row in found]
                line[2].semilogx(
                    devices, sent, marker + style, color=color, ms=4, lw=1 if adapted else 2.5, label=label
                )
        line[2].set_ylim(bottom=0)
        line[2].set_title(f"{model}: collectives", fontsize=9)
        line[2].set_ylabel("GB sent by each device in a step", fontsize=8)
        for axis in line:
            axis.set_xticks(devices, [str(n) for n in devices])
            axis.minorticks_off()
            axis.set_xlabel("devices", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.legend(fontsize=7, frameon=False)
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "results.png", dpi=110)


if __name__ == "__main__":
    print(tables())
    draw(json.loads((HERE / "results.json").read_text()))

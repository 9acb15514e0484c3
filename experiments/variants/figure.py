"""The table and the figure of results.json and costs.json: python experiments/variants/figure.py."""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def rows():
    """By arm: what results.json has of it, and what costs.json has of its step."""
    (results,) = json.loads((HERE / "results.json").read_text()).values()
    (costs,) = json.loads((HERE / "costs.json").read_text()).values()
    return {name: row | costs["minilm"][name] for name, row in results.items()}


def table(found):
    lines = [
        "| | trained | rate | accuracy, three seeds | mean ± sd | step / LoRA's | temporary | state |",
        "|---" * 8 + "|",
    ]
    for name, row in sorted(found.items(), key=lambda item: -statistics.mean(item[1]["accuracy"])):
        seeds = ", ".join(f"{x:.1%}" for x in row["accuracy"])
        mean, spread = statistics.mean(row["accuracy"]), statistics.stdev(row["accuracy"])
        cells = (
            f"{row['trained']:,}",
            f"{row['rate']:.0e}",
            seeds,
            f"{mean:.1%} ± {100 * spread:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['temporary_mb']:.0f} MB",
            f"{row['state_mb']:.1f} MB",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found):
    """Accuracy of each arm, a dot for each seed, and the time of its step."""
    names = sorted(found, key=lambda name: statistics.mean(found[name]["accuracy"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.6), sharey=True, width_ratios=(3, 2))
    for y, name in enumerate(names):
        seeds = [100 * x for x in found[name]["accuracy"]]
        left.plot(seeds, [y] * len(seeds), "o", color="#d1495b", ms=5, alpha=0.6, mew=0)
        left.plot(statistics.mean(seeds), y, "|", color="black", ms=12)
        low, high = found[name]["quartiles"]
        right.barh(y, found[name]["ratio"], color="#8d99ae", height=0.6)
        right.plot([low, high], [y, y], color="black", lw=1)
    left.set_yticks(range(len(names)), [f"{name}  ({found[name]['trained']:,})" for name in names], fontsize=8)
    left.set_xlabel("right on test sentences, % (three seeds, | their mean)", fontsize=8)
    right.set_xlabel("step time / LoRA's", fontsize=8)
    right.axvline(1, color="black", lw=0.8, ls=":")
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    left.grid(axis="x", lw=0.4)
    figure.tight_layout()
    figure.savefig(HERE / "results.png", dpi=130)


def main():
    found = rows()
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()

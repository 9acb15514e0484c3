"""Settings: every field of a run, once; the command line, the files and the help are made of it."""

from __future__ import annotations

import dataclasses
from typing import Any


def _field(default: Any, group: str, help: str, **options: Any) -> Any:
    """A field with what its flag says of it: the group it is shown in, and a line of help."""
    if isinstance(default, (dict, list)):
        return dataclasses.field(
            default_factory=lambda: type(default)(default), metadata={"group": group, "help": help, **options}
        )
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made by; the same settings give the same adapter, bit for bit, on the same machine."""

    model: str = _field("", "what", "a model's directory, or hf://ORG/NAME to download one")
    data: tuple[str, ...] = _field((), "what", "files to train on: .jsonl, .txt, .csv, .parquet")
    out: str = _field("", "what", "the directory that will hold the adapter")

    task: str | None = _field(
        None,
        "data",
        "lm, to predict text, or classification, to tell labels apart; default: what the model is made for",
        choices=("lm", "classification"),
    )
    columns: dict[str, str] = _field(
        {}, "data", "which columns are meant, where they have other names: text=body label=stars", metavar="NAME=COLUMN"
    )
    chat_template: str | None = _field(
        None, "data", "a chat template in Jinja, instead of the tokenizer's", metavar="FILE"
    )
    length: int | None = _field(
        None, "data", "tokens of a row; default: 512, or what the model has positions for", least=2
    )
    packing: bool | None = _field(
        None, "data", "several examples in a row, which do not see each other; default: on for lm"
    )
    too_long: str = _field(
        "error",
        "data",
        "what becomes of an example longer than a row: error, truncate it, or drop it; plain text is cut into rows",
        choices=("error", "truncate", "drop"),
    )
    eval_data: tuple[str, ...] = _field((), "data", "files to evaluate on, instead of a part of --data", metavar="FILE")
    eval_share: float = _field(
        0.05, "data", "the share of the data that is held out to evaluate on; 0 for no evaluation", least=0, below=1
    )

    targets: str = _field("all-linear", "adapter", "all-linear, attention, or a regex of paths")
    variant: str = _field("LoRA", "adapter", "LoRA, DoRA, Full ...")
    rank: int | None = _field(None, "adapter", "of the factors")
    alpha: float | None = _field(None, "adapter", "what ΔW is scaled by, over the rank")

    learning_rate: float | None = _field(None, "training", "its peak; None: as suits the variant")
    warmup: float = _field(0.1, "training", "the share of the steps in which it rises to that")
    steps: int | None = _field(None, "training", "how many; None: as many as --epochs are")
    epochs: float = _field(1.0, "training", "passes over the data")
    batch: int = _field(8, "training", "rows of a step")
    accumulate: int = _field(1, "training", "parts that a step is taken in")
    seed: int = _field(0, "training", "of all that is random")
    precision: str | None = _field(None, "training", "float32 or bfloat16; None: as the weights are stored")

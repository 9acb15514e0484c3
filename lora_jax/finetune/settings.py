"""Settings: every field of a run, once; the command line, the files and the help are made of it."""

from __future__ import annotations

import dataclasses
from typing import Any


def _field(default: Any, group: str, help: str, **options: Any) -> Any:
    """A field with what its flag says of it: the group it is shown in, and what it is.

    Options say what it may hold: `choices`, `least`, `above`, `below`; and what help shows for it: `metavar`.
    """
    if isinstance(default, (dict, list)):
        return dataclasses.field(
            default_factory=lambda: type(default)(default), metadata={"group": group, "help": help, **options}
        )
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **options})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is made by; the same settings give the same adapter, bit for bit, on the same machine."""

    model: str = _field("", "files", "a model's directory, or hf://ORG/NAME to download one", metavar="DIR")
    data: tuple[str, ...] = _field((), "files", "files to train on: .jsonl, .txt, .csv, .parquet", metavar="FILE")
    out: str = _field("", "files", "the directory that will hold the adapter", metavar="DIR")

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
    date: str | None = _field(
        None, "data", "the day that a chat template is told it is, as 2025-01-31; default: today", metavar="DAY"
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

    targets: str = _field(
        "all-linear",
        "adapter",
        "what is adapted: all-linear, all linear layers but the head; attention, those of attention; all, every "
        "weight, for --variant Full; or a regex of whole paths, as '.*/(query|value)/kernel' (lora-jax sites has them)",
        metavar="WHICH",
    )
    trains: str | None = _field(
        None, "adapter", "a regex of paths that train whole besides, such as '.*norm.*'", metavar="REGEX"
    )
    variant: str = _field(
        "LoRA",
        "adapter",
        "LoRA, DoRA, AdaLoRA, LoRAFA, LoRAXS, VeRA, LoHa, LoKr, IA3; or Full, which trains the weights themselves",
        metavar="NAME",
    )
    rank: int | None = _field(None, "adapter", "of the factors; default: 8, of VeRA 256", least=1)
    alpha: float | None = _field(None, "adapter", "ΔW is scaled by alpha / rank; default: by 1")
    dropout: float | None = _field(
        None, "adapter", "the share of ΔW's inputs that a step drops; default: 0", least=0, below=1
    )
    init: str | None = _field(
        None,
        "adapter",
        "how factors begin: normal, uniform, orthogonal, pissa, pissa_niter_4, olora; or by four batches of the data: "
        "eva, corda, lora_ga; default: normal",
        metavar="NAME",
    )
    set: dict[str, str] = _field(
        {},
        "adapter",
        "what else the variant has, as scaling=rank_stabilized of LoRA, side=in of IA3, factor=4 of LoKr",
        metavar="FIELD=VALUE",
    )
    prune_to: int | None = _field(
        None,
        "adapter",
        "of AdaLoRA: prune to so many singular values for each weight, on the average of all; default: none is pruned",
        least=1,
    )

    steps: int | None = _field(None, "training", "how many; default: as many as --epochs are", least=1)
    epochs: float = _field(1.0, "training", "passes over the data", above=0)
    batch: int = _field(8, "training", "rows of a step, on all devices together", least=1)
    accumulate: int = _field(1, "training", "in how many parts, one after the other, a step takes its rows", least=1)
    learning_rate: float | None = _field(
        None, "training", "its peak; default: as suits the variant, 2e-4 for LoRA, 2e-5 for Full", above=0
    )
    schedule: str = _field(
        "cosine",
        "training",
        "how it goes on after the warm-up: along a cosine to zero, on a line to zero, or not at all",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = _field(0.1, "training", "the share of the steps in which it rises to its peak", least=0, below=1)
    weight_decay: float = _field(0.0, "training", "AdamW's", least=0)
    clip_norm: float | None = _field(
        1.0, "training", "the most that the norm of the gradient may be; none: any", above=0
    )
    lora_plus_ratio: float | None = _field(
        None, "training", "how much faster B learns than A (LoRA+, 16 in its paper); default: as fast", above=0
    )
    seed: int = _field(0, "training", "of all that is random: the same seed gives the same bits", least=0, below=2**32)

    precision: str | None = _field(
        None,
        "machine",
        "of the base and of activations; factors are float32; default: as the weights are stored",
        choices=("float32", "bfloat16", "float16"),
    )
    remat: str = _field(
        "none",
        "machine",
        "what of a decoder's layers the backward pass makes anew, for less memory: none of it, all but products of "
        "weights, or the full layer",
        choices=("none", "products", "full"),
    )
    mesh: str | None = _field(
        None,
        "machine",
        "devices by axis, as data=2,fsdp=2,tp=2: rows are split over data and fsdp, weights over fsdp and tp (of the "
        "Llama family); default: all devices on data, if they divide the batch, else one",
        metavar="AXES",
    )

    eval_every: int | None = _field(
        None, "records", "evaluate after each so many steps too; default: before and after alone", least=1
    )
    patience: int | None = _field(
        None,
        "records",
        "stop after so many evaluations without a better loss; the best adapter is kept; default: never",
        least=1,
    )
    log_every: int = _field(10, "records", "a line each so many steps, where stderr is no terminal", least=1)
    save_every: int = _field(100, "records", "a checkpoint each so many steps, to resume from", least=1)
    keep_checkpoints: bool = _field(False, "records", "whether they stay when the run is done")

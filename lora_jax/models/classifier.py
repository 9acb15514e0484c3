"""A classifier of texts: BERT, its summary of the tokens, and a linear head.

It is transformers' BertForSequenceClassification. Its leaves are BERT's under `encoder`, and `head`. Shapes in
comments: B batch, L length, D hidden_size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from lora_jax.formats import huggingface
from lora_jax.formats.huggingface.absent import Absent
from lora_jax.formats.huggingface.directory import CONFIG, read_json
from lora_jax.models import bert
from lora_jax.models.bert import Bert, Config
from lora_jax.models.fields import check_fixed
from lora_jax.models.loading import filled
from lora_jax.models.part import Part

CLASS = "BertForSequenceClassification"
HEADS = (r"cls\..*", r"classifier\..*", r"qa_outputs\..*")  # of other tasks
FIXED = {"problem_type": "single_label_classification"}  # of each text one label, and no numbers to be guessed


def mean_pool(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The mean of hidden states [B, L, D] over the tokens that a mask [B, L] marks: [B, D], zeros where it marks none.

    >>> mean_pool(jnp.array([[[1.0], [3.0], [8.0]]]), jnp.array([[1, 1, 0]]))
    Array([[2.]], dtype=float32)
    """
    if mask is None:
        return hidden.mean(axis=1)
    wide = hidden.dtype if hidden.dtype.itemsize >= 4 else jnp.float32  # bfloat16 cannot count to 300
    weights = mask.astype(wide)[:, :, None]
    mean = (hidden.astype(wide) * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)
    return mean.astype(hidden.dtype)


class Classifier(Part):
    """From token ids to logits.

    A config with a pooler makes it transformers' model: the head sees what the pooler makes of the first token. Without
    one it sees the mean over the tokens, as sentence encoders have it; that is no model of transformers.

    Attributes:
      config: BERT's.
      labels: The names of the classes, in the order of the logits.

    >>> model, ids = Classifier(Config(100, 8, 1, 2, 16), labels=("no", "yes")), jnp.array([[1, 5, 9]])
    >>> model.apply(model.init(jax.random.key(0), ids), ids).shape
    (1, 2)
    """

    config: Config
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, labels]; the arguments are as in `Bert`."""
        encoder = self.part(Bert, self.config, name="encoder")
        hidden = encoder(input_ids, attention_mask, token_type_ids)
        pooled = encoder.pool(hidden) if self.config.pooler else mean_pool(hidden, attention_mask)
        return self.dense(len(self.labels), "head")(pooled)


def add_head(key: jax.Array, encoder: Bert, params: Any, labels: int | Sequence[str]) -> tuple[Classifier, Any]:
    """Put a freshly drawn head on the mean of an encoder's hidden states, and leave out its pooler, which is not read.

    Args:
      key: Draws the head's kernel [D, labels]; its bias is zero.
      encoder: The encoder.
      params: Its variables, {"params": ...}; they are shared, not copied.
      labels: How many classes there are, or their names.

    Returns:
      The classifier and its variables, {"params": {"encoder": ..., "head": ...}}.

    >>> encoder, ids = Bert(Config(100, 8, 1, 2, 16)), jnp.array([[1, 5, 9]])
    >>> model, params = add_head(jax.random.key(1), encoder, encoder.init(jax.random.key(0), ids), labels=3)
    >>> model.apply(params, ids).shape
    (1, 3)
    """
    names = unnamed(labels) if isinstance(labels, int) else tuple(labels)
    config = dataclasses.replace(encoder.config, pooler=False)
    model = Classifier(config, encoder.dtype, encoder.param_dtype, names)
    shape = jnp.zeros((1, config.hidden_size), encoder.param_dtype)
    head = encoder.dense(len(names), "head").init(key, shape)
    kept = {name: value for name, value in params["params"].items() if name != "pooler"}
    return model, {"params": {"encoder": kept, "head": head["params"]}}


def load(
    directory: str | Path,
    *,
    labels: Sequence[str] | None = None,
    sha256: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    abstract: bool = False,
) -> tuple[Classifier, Any]:
    """Load a classifier from a Hugging Face directory; see `opened` for labels, `lora_jax.models.load` for the rest."""
    checkpoint = opened(directory, labels, sha256=sha256, ignore=ignore)
    config = Config.from_huggingface(checkpoint.config)
    names = labels_of(checkpoint.config, checkpoint.tensors["classifier.bias"].shape[0])
    model = Classifier(config, labels=names)
    return filled(model, checkpoint, NAMES, dtype=dtype, shardings=shardings, abstract=abstract)


def opened(
    directory: str | Path,
    labels: Sequence[str] | None = None,
    *,
    sha256: str | Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
) -> huggingface.Checkpoint:
    """A directory as a classifier's checkpoint.

    Args:
      directory: Of a BERT. If it is a classifier's, it is taken as it is. Else heads of other tasks are left out, and a
        head of zeros is put on, which says that all classes are as likely; where there is no pooler, there is one that
        begins as the identity, to be trained whole. So the base is known by its directory and its labels alone.
      labels: The names of the classes; of a classifier's directory some of its own, or None for these.
      sha256: As in `lora_jax.models.load`.
      ignore: Likewise.

    Raises:
      FileNotFoundError: The directory or one of its files is missing.
      ValueError: It is no BERT, is a classifier of other labels, or is none and no labels are given.
    """
    config = read_json(Path(directory) / CONFIG)
    if config.get("model_type") != "bert":
        kind = config.get("model_type")
        raise ValueError(f"'{directory}': model_type is {kind!r}, and only 'bert' classifies texts here: give one")
    if holds(config):
        check_fixed({name: value for name, value in config.items() if value is not None}, FIXED, "classifier")
        ignored = (*(f"bert\\.{pattern}" for pattern in bert.IGNORED), *ignore)
        checkpoint = huggingface.open_checkpoint(directory, renames=RENAMES, ignored=ignored, sha256=sha256)
        bias = checkpoint.tensors.get("classifier.bias")
        if bias is None or len(bias.shape) != 1:
            raise huggingface.CheckpointError(f"'{directory}' says {CLASS}, and has no classifier.bias: copy it anew")
        own = labels_of(config, bias.shape[0])
        if odd := [label for label in labels or () if label not in own]:
            raise ValueError(
                f"'{directory}' tells {', '.join(map(repr, own))} apart, and not {odd[0]!r}: give a model without a "
                "classifier, or labels that are among these"
            )
        return checkpoint
    if labels is None or len({*labels}) < max(2, len(labels)):
        raise ValueError(f"'{directory}' has no classifier, and labels are {labels}: give two or more different names")
    ignored = (*bert.IGNORED, *HEADS, *ignore)
    plain = huggingface.open_checkpoint(directory, renames=bert.RENAMES, ignored=ignored, sha256=sha256)
    width = Config.from_huggingface(config).hidden_size
    tensors = {f"bert.{name}": dataclasses.replace(x, name=f"bert.{name}") for name, x in plain.tensors.items()}
    first = next(iter(tensors.values()), None)
    if first is None:
        raise huggingface.CheckpointError(f"'{directory}' has no weights of an encoder: give a BERT's directory")
    shapes = {"classifier.weight": (len(labels), width), "classifier.bias": (len(labels),)}
    shapes |= {"bert.pooler.dense.weight": (width, width), "bert.pooler.dense.bias": (width,)}
    for name, shape in shapes.items():
        pooler = name.startswith("bert.pooler")
        if name not in tensors and not (pooler and "bert.pooler.dense.weight" in plain.tensors):
            tensors[name] = Absent(first.file, name, shape, first.stored, 0, diagonal=pooler and len(shape) == 2)
    return huggingface.Checkpoint(plain.directory, {**config, **described(labels)}, tensors)


def holds(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a classifier.

    >>> holds({"architectures": ["BertForSequenceClassification"]}), holds({"architectures": None})
    (True, False)
    """
    return CLASS in (config.get("architectures") or ())


def described(labels: Sequence[str]) -> dict[str, Any]:
    """What a config.json says of a classifier with these labels, besides BERT's own.

    >>> described(["no", "yes"])["id2label"]
    {'0': 'no', '1': 'yes'}
    """
    ids = {name: i for i, name in enumerate(labels)}
    return {"architectures": [CLASS], "id2label": {str(i): n for n, i in ids.items()}, "label2id": ids, **FIXED}


def labels_of(config: Mapping[str, Any], number: int) -> tuple[str, ...]:
    """The names of so many classes, by a config.json; where it has none, transformers' own.

    Raises:
      ValueError: It names others.

    >>> labels_of({"id2label": {"1": "yes", "0": "no"}}, 2), labels_of({}, 2)
    (('no', 'yes'), ('LABEL_0', 'LABEL_1'))
    """
    given = config.get("id2label")
    if not given:
        return unnamed(number)
    found = {str(i): name for i, name in given.items()} if isinstance(given, dict) else {}
    names = [found.get(str(i)) for i in range(number)]
    if len(found) != number or not all(isinstance(name, str) for name in names) or len({*names}) < number:
        raise ValueError(f"config.json: id2label is {given}, and the weights have {number} classes: name each, once")
    return tuple(map(str, names))


def unnamed(number: int) -> tuple[str, ...]:
    """The names of classes that were given none."""
    return tuple(f"LABEL_{i}" for i in range(number))


def left_out(ignore: Iterable[str]) -> bool:
    """Whether a classifier's head is among the tensors to leave out."""
    return any(re.fullmatch(pattern, "classifier.weight") for pattern in ignore)


# As in `lora_jax.models.bert`.
NAMES = (
    *((ours, f"bert.{theirs}", layout) for ours, theirs, layout in bert.NAMES),
    (".*/head", "classifier", "linear"),
)
RENAMES = bert.RENAMES[1:]

"""BERT as a classifier: its directory, its head where there is none, its task, and its adapters in commands."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_directories as tiny

import lora_jax as lora
from lora_jax import cli, models
from lora_jax.finetune import base, task
from lora_jax.formats import huggingface, peft
from lora_jax.models import bert, classifier
from lora_jax.models.classifier import Classifier

LABELS = ("no", "yes", "perhaps")
RULES = {r".*/(query|value|up)/kernel": lora.LoRA(2)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.encoder(tmp_path_factory.mktemp("plain") / "bert")


@pytest.fixture(scope="module")
def poolerless(tmp_path_factory):
    return tiny.encoder(tmp_path_factory.mktemp("plain") / "bert", pooler=False)


@pytest.fixture(scope="module")
def run(plain, tmp_path_factory):
    """An adapter's folder, as train writes it."""
    folder = tmp_path_factory.mktemp("run")
    made, lora_params = tiny.adapter(folder / "adapter.safetensors", plain, RULES, LABELS)
    base.write_labels(folder, made.model.labels)
    return folder, made, lora_params


# The base


@pytest.mark.parametrize("name", ["plain", "poolerless"])
def test_a_head_is_put_on_an_encoder(name, request):
    directory = request.getfixturevalue(name)
    made = base.open_base(directory, labels=LABELS)
    encoder = models.load(directory)[1]["params"]
    own = dict(made.params["params"]["encoder"])
    if name == "poolerless":
        pooler = own.pop("pooler")
        np.testing.assert_array_equal(pooler["kernel"], np.eye(16))
        assert not pooler["bias"].any()
    assert tiny.same(own, encoder)
    assert not any(x.any() for x in jax.tree.leaves(made.params["params"]["head"]))
    poolers = {"params/encoder/pooler/kernel", "params/encoder/pooler/bias"} if name == "poolerless" else set()
    assert {*made.whole} == {"params/head/kernel", "params/head/bias", *poolers}


def test_shapes_fingerprint_and_checkpoint_are_those_of_what_is_loaded(poolerless):
    made = base.open_base(poolerless, labels=LABELS)
    shapes = base.open_base(poolerless, labels=LABELS, abstract=True)
    assert (shapes.model, shapes.whole) == (made.model, made.whole)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), made.params
    )
    checkpoint = models.opened(made.model, poolerless)
    found = huggingface.fingerprint(shapes.params, checkpoint, models.names(made.model))
    assert found == lora.fingerprint(made.params)


def test_a_directory_is_written_and_read(plain, tmp_path):
    made = base.open_base(plain, labels=LABELS)
    params = tiny.random(made.params)
    models.save(tmp_path / "own", made.model, params)
    models.save(tmp_path / "from", made.model, params, source=plain)
    for folder in (tmp_path / "own", tmp_path / "from"):
        model, found = models.load(folder)
        assert model == made.model and tiny.same(found, params)
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert config["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
        assert config["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}
    assert (tmp_path / "from" / "tokenizer.json").is_file()
    encoder, _ = models.load(tmp_path / "own", ignore=[r"classifier\..*"])
    assert isinstance(encoder, bert.Bert)
    assert base.known_labels(tmp_path / "own") == LABELS and base.known_labels(plain) is None
    assert base.open_base(tmp_path / "own", labels=["yes", "no"]).model.labels == LABELS


def test_what_is_no_classifier(plain, tmp_path):
    model = Classifier(bert.Config(40, 16, 1, 2, 24, pooler=False))
    with pytest.raises(ValueError, match="no classifier of the mean"):
        models.save(
            tmp_path / "mean", model, tiny.random(jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 1), int)))
        )
    with pytest.raises(ValueError, match="give two or more different names"):
        base.open_base(plain, labels=["a", "a"])
    with pytest.raises(ValueError, match="is an encoder, which learns to classify here: give data with a label"):
        task.of(base.open_base(plain).model)
    with pytest.raises(ValueError, match="only 'bert' classifies texts"):
        base.open_base(tiny.decoder(tmp_path / "llama"), labels=LABELS)
    made = base.open_base(plain, labels=LABELS)
    written = models.save(tmp_path / "own", made.model, made.params)
    with pytest.raises(ValueError, match="tells 'no', 'yes', 'perhaps' apart, and not 'never'"):
        base.open_base(written, labels=["no", "never"])
    config = json.loads((written / "config.json").read_text())
    for change, message in (
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
        ({"id2label": {"0": "a"}}, "the weights have 3 classes"),
    ):
        (written / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            models.load(written)


# The task


def batch_of(texts, labels, length=6):
    ids = np.full((len(texts), length), 2, np.int32)
    for row, text in zip(ids, texts, strict=True):
        words = ["<s>", *text.split(), "</s>"]
        row[: len(words)] = [tiny.WORDS.index(word) for word in words]
    return {"input_ids": ids, "attention_mask": (ids != 2).astype(np.int32), "labels": np.array(labels, np.int32)}


def test_rows_without_a_label_and_padding_do_not_count(plain):
    made = base.open_base(plain, labels=LABELS)
    of, params = task.of(made.model), tiny.random(made.params)
    measured, logits_of = jax.jit(of.measures), jax.jit(of.logits)
    batch = batch_of(["good film", "a", "bad list film"], [0, 2, 1])
    logits = np.asarray(logits_of(params, batch))
    scores = np.asarray(jax.nn.log_softmax(logits))
    found = measured(params, batch)
    np.testing.assert_allclose(found["loss"], -np.mean(scores[[0, 1, 2], [0, 2, 1]]), rtol=1e-6)
    np.testing.assert_allclose(found["accuracy"], np.mean(logits.argmax(-1) == [0, 2, 1]), rtol=1e-6)
    more = {name: np.concatenate([x, np.zeros_like(x[:2])]) for name, x in batch.items()}
    more["labels"][3:] = -1
    again = measured(params, more)
    np.testing.assert_allclose([again[name] for name in found], [*found.values()], rtol=1e-6)
    assert of.weight(more) == 3
    garbage = {**batch, "input_ids": np.where(batch["attention_mask"], batch["input_ids"], 9)}
    np.testing.assert_allclose(logits_of(params, garbage), logits, atol=1e-6)


# An adapter


def test_peft_has_the_head_and_the_labels_come_back(plain, poolerless, run, tmp_path):
    folder, made, lora_params = run
    names = models.names(made.model)
    peft.save(tmp_path / "peft", lora_params, names, base=made.params, task_type="SEQ_CLS")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    assert base.for_adapter(plain, folder)[0].labels == LABELS
    assert base.for_adapter(plain, folder / "adapter.safetensors", abstract=True)[0].labels == LABELS
    assert base.for_adapter(plain, tmp_path / "peft", abstract=True)[0].labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert tiny.same(peft.load(tmp_path / "peft", made.params, names), lora_params)
    with pytest.raises(ValueError, match="labels.json' names"):
        base.write_labels(tmp_path / "peft", ["only"])
        base.for_adapter(plain, tmp_path / "peft")
    (tmp_path / "peft" / "labels.json").write_text("no, yes")
    with pytest.raises(ValueError, match="labels.json' is no JSON"):
        base.for_adapter(plain, tmp_path / "peft")


def test_merged_and_shown_as_what_is_lifted(plain, run, tmp_path, capsys):
    folder, made, lora_params = run
    assert cli.main(["merge", "--model", str(plain), "--adapter", str(folder), "--out", str(tmp_path / "merged")]) == 0
    model, params = models.load(tmp_path / "merged")
    assert model.labels == LABELS
    expected = lora.merge(made.params, lora_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    texts, found = ["good film", "a b list"], []
    for name, options in (
        ("adapter", ["--model", str(plain), "--adapter", str(folder)]),
        ("merged", ["--model", str(tmp_path / "merged")]),
    ):
        given = [x for text in texts for x in ("--prompt", text)]
        assert cli.main(["generate", *options, *given, "--json", str(tmp_path / f"{name}.json")]) == 0
        content = json.loads((tmp_path / f"{name}.json").read_text())
        found.append([answers["answers"][0]["probabilities"] for answers in content["prompts"]])
        assert [len(answers["answers"]) for answers in content["prompts"]] == [1, 1]  # the encoder by itself has none
    assert "yes" in capsys.readouterr().out
    batch = batch_of(texts, [0, 0])
    logits = jax.jit(made.model.apply)(expected, batch["input_ids"], batch["attention_mask"])
    for given in found:
        np.testing.assert_allclose([[*row.values()] for row in given], jax.nn.softmax(logits), atol=1e-5)
        assert [*given[0]] == [*LABELS]


def test_sites_of_an_encoder_are_those_of_a_classifier_but_for_the_head(poolerless, capsys):
    assert cli.main(["sites", str(poolerless)]) == 0
    printed = capsys.readouterr().out
    assert "params/encoder/layers_*/attention/query/kernel" in printed and "head" not in printed
    assert "bert.encoder.layer.*.attention.self.query" in printed or "bert.encoder.layer.0" in printed
    assert "pooler" not in printed
    assert classifier.holds(json.loads((poolerless / "config.json").read_text())) is False


@pytest.mark.standard_promotion
def test_train_learns_to_classify(poolerless, tmp_path, capsys):
    """From a file of labels to an adapter that names them, of an encoder without a pooler."""
    draws = np.random.default_rng(0)
    rows = [("good" if i % 2 else "bad", " ".join(draws.choice([*"abcdef"], 2))) for i in range(48)]
    lines = [json.dumps({"text": f"{rest} {word}", "label": f"is {word}"}) for word, rest in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    options = {"model": poolerless, "data": tmp_path / "data.jsonl", "out": tmp_path / "run", "length": 8, "batch": 8}
    options |= {"steps": 80, "learning-rate": 3e-2, "rank": 4, "eval-share": 0.25}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    assert cli.main(["train", *words, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["before"]["loss"] == pytest.approx(np.log(2), rel=1e-5)  # of a head of zeros
    assert found["after"]["accuracy"] == 1 and found["after"]["loss"] < 0.3
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == ["is bad", "is good"]
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and {*saved["modules_to_save"]} == {"classifier", "bert.pooler.dense"}
    given = [
        "--model",
        str(poolerless),
        "--adapter",
        str(tmp_path / "run"),
        "--prompt",
        "a b good",
        "--prompt",
        "c d bad",
    ]
    assert cli.main(["generate", *given, "--json", str(tmp_path / "answers.json")]) == 0
    prompts = json.loads((tmp_path / "answers.json").read_text())["prompts"]
    assert [prompt["answers"][0]["label"] for prompt in prompts] == ["is good", "is bad"]

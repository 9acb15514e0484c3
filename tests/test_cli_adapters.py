"""`lora-jax merge`, `convert`, `info`, `extract`, `combine`: what they write and say, and what they refuse."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import randomized, split_at_random

import lora_jax as lora
from lora_jax import cli, models, tree
from lora_jax.formats import adapter, peft
from lora_jax.models import bert, gpt2, llama
from lora_jax.models.stored import Stored

IDS = jnp.array([[1, 5, 9, 2]])
# Of the same shapes where they can be, as what runs leaf by leaf is compiled for each shape.
MODELS = {
    "llama": llama.Llama(llama.Config(40, 16, 2, 4, 24, num_key_value_heads=2, max_position_embeddings=16)),
    "gpt2": gpt2.GPT2(gpt2.Config(40, 16, 2, 4, 24, max_position_embeddings=16)),
    "bert": bert.Bert(bert.Config(40, 16, 2, 4, 24, pooler=False)),
}


def targeted(variant, *ends):
    return lambda path, site: variant if site.kind == "linear" and any(x in path for x in ends) else None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each kind, two adapters of each, and what is wrong with some."""
    root = tmp_path_factory.mktemp("place")
    for number, (name, model) in enumerate(MODELS.items()):
        shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
        rng = np.random.default_rng(number)
        params = jax.tree.map(lambda x, rng=rng: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
        models.save(root / name, model, params)
        (root / name / "tokenizer.json").write_text("{}")
        stored = Stored.of(root / name, *models.load(root / name, abstract=True))
        params = models.load(root / name)[1]
        sites = stored.sites()
        for i, rule in enumerate(
            (targeted(lora.LoRA(2, alpha=4), "query", "qkv", "up"), targeted(lora.LoRA(3), "up", "down"))
        ):
            own = randomized(split_at_random(params, rule, sites)[1], 0.1, seed=i)
            base = {"base": params, "fingerprint": stored.fingerprint()}
            assert adapter.save(root / f"{name}-{i}", own, stored.names, **base) is None
        if name == "llama":
            models.save(root / "other", model, jax.tree.map(lambda x: np.asarray(x) + 1, params))
            models.save(root / "half", model, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params))
            full = split_at_random(params, {".*/last_norm/scale": lora.Full()}, sites)[1]
            lora.save(root / "full.safetensors", full, params)
            mixed = split_at_random(params, {".*/up/kernel": lora.LoRA(2), ".*/down/kernel": lora.LoHa(2)}, sites)[1]
            lora.save(root / "mixed.safetensors", mixed, params)
            with lora.Checkpoints(root / "run" / "checkpoints", params, lora_params=lambda state: state) as checkpoints:
                checkpoints.save(3, lora.load(root / "llama-0" / "adapter.safetensors"))
    whole = (root / "llama-0" / "adapter.safetensors").read_bytes()
    (root / "cut.safetensors").write_bytes(whole[:-100])
    (root / "text.safetensors").write_text("no adapter")
    (root / "empty").mkdir()
    shutil.copytree(root / "llama-0", root / "halved")
    for file in ("adapter.safetensors", "adapter_model.safetensors"):
        (root / "halved" / file).unlink()
    shutil.copytree(root / "llama", root / "unknown")
    (root / "unknown" / "config.json").write_text('{"model_type": "mamba"}')
    shutil.copytree(root / "llama", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()
    return root


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """An empty folder of one's own, in which the others are links."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line):
    try:
        return cli.main(line.split())
    except SystemExit as error:
        return error.code


def flat(params):
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("name", MODELS)
def test_merge(here, capsys, name):
    assert call(f"merge --model {name} --adapter {name}-0 --out merged --json merged.json") == 0
    out, err = capsys.readouterr()
    assert out.startswith("merged: ") and "tensors merged, in float32" in out and not err
    params = models.load(name)[1]
    expected = lora.merge(params, lora.load(f"{name}-0/adapter.safetensors"))
    assert jax.tree.all(jax.tree.map(np.array_equal, models.load("merged")[1], expected))
    assert {x.name for x in (here / "merged").iterdir()} == {x.name for x in (here / name).iterdir()}
    assert json.loads((here / "merged.json").read_text())["rounding"]["stuck"] == 0
    assert call(f"merge --model {name} --adapter {name}-0/adapter.safetensors --out again") == 0
    (here / "peft").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / f"{name}-0" / file, here / "peft")
    assert call(f"merge --model {name} --adapter peft --out thrice") == 0
    for other in ("again", "thrice"):
        assert (here / other / "model.safetensors").read_bytes() == (here / "merged" / "model.safetensors").read_bytes()


def test_merge_says_what_rounding_costs(here, capsys):
    small = lora.scale(lora.load("llama-0/adapter.safetensors"), 0.02)
    lora.save("small.safetensors", small)
    assert call("merge --model half --adapter small.safetensors --out a --json a.json") == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: bfloat16 keeps ") and err.count("\n") == 1
    assert "--dtype float32 keeps all, --round stochastic keeps it on average" in err
    found = json.loads((here / "a.json").read_text())["rounding"]
    before, exact, after = (
        flat(t)
        for t in (
            models.load("half")[1],
            lora.merge(models.load("half", dtype="float32")[1], small),
            models.load("a")[1],
        )
    )
    norm = np.linalg.norm
    assert found["lost"] == pytest.approx(norm(after - exact) / norm(exact - before), rel=1e-3) and found["lost"] > 0.3
    assert found["stuck"] == np.sum((after == before) & (exact != before))
    # On average, seeds lose nothing; each loses more than rounding to the nearest does.
    mean = []
    for seed in range(4):
        merge = f"merge --model half --adapter small.safetensors --out s{seed}"
        assert call(f"{merge} --round stochastic --seed {seed}") == 0
        mean.append(flat(models.load(f"s{seed}")[1]))
    assert norm(np.mean(mean, 0) - exact) < 0.7 * norm(mean[0] - exact)
    out, err = capsys.readouterr()
    assert "on average nothing is lost" in out and not err
    assert call("merge --model half --adapter small.safetensors --out wide --dtype float32") == 0
    assert not capsys.readouterr().err
    assert (flat(models.load("wide")[1]) == exact).all()


def test_merge_of_several(here):
    assert call("merge --model llama --adapter llama-0=0.5 --adapter llama-1=-1 --out both") == 0
    params = models.load("llama")[1]
    one, two = (lora.load(f"llama-{i}/adapter.safetensors") for i in range(2))
    expected = lora.merge(params, lora.combine([one, two], [0.5, -1.0]))
    for a, b in zip(jax.tree.leaves(models.load("both")[1]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_cast_of_the_base_is_that_base(here):
    """What was trained with the weights of a checkpoint cast to another dtype is an adapter of it."""
    lora_params = lora.load("llama-0/adapter.safetensors")
    lora.save("cast.safetensors", lora_params, models.load("llama", dtype="bfloat16")[1])
    assert call("info cast.safetensors --model llama") == 0
    assert call("info cast.safetensors --model other") == 1


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_again(here, name):
    assert call(f"convert --model {name} --adapter {name}-0 --to peft --out one") == 0
    assert call(f"convert --model {name} --adapter one --to native --out two.safetensors") == 0
    assert call(f"convert --model {name} --adapter two.safetensors --to peft --out three") == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (here / "one" / file).read_bytes() == (here / "three" / file).read_bytes()
    before, after = lora.load(f"{name}-0/adapter.safetensors"), lora.load("two.safetensors", models.load(name)[1])
    for path, own in before.items():
        for factor, x in own.factors.items():
            assert np.asarray(x).tobytes() == np.asarray(after[path].factors[factor]).tobytes()
    config = json.loads((here / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    assert config["task_type"] == ("FEATURE_EXTRACTION" if name == "bert" else "CAUSAL_LM")


def test_portable(here):
    lora_params = lora.load("llama-0/adapter.safetensors")
    stable = {
        p: lora.Adapter(a.factors, lora.LoRA(2, scaling="rank_stabilized"), a.site) for p, a in lora_params.items()
    }
    lora.save("stable.safetensors", stable)
    assert call("convert --model llama --adapter stable.safetensors --to peft --portable --out out") == 0
    assert not json.loads((here / "out" / "adapter_config.json").read_text())["use_rslora"]


@pytest.mark.parametrize("what", ["llama-0", "llama-0/adapter.safetensors", "run", "full.safetensors"])
def test_info(here, capsys, what):
    assert call(f"info {what} --model llama --json found.json") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.replace(str(here.resolve()), "").splitlines())) <= 80 and "It fits llama." in out
    found = json.loads((here / "found.json").read_text())
    assert found["fits"] and found["version"] == lora.__version__
    loaded = lora.load(here / ("full.safetensors" if "full" in what else "llama-0/adapter.safetensors"))
    assert found["leaves"].keys() == loaded.keys()
    assert found["trained"] == tree.nbytes(loaded) // 4
    for other, status in (("other", 1), ("gpt2", 1)):
        assert call(f"info {what} --model {other}") == status
        assert f"It does not fit {other}: made for another base" in capsys.readouterr().out


def test_info_of_pefts_folder(here, capsys):
    (here / "folder").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(here / "llama-0" / file, here / "folder")
    assert call("info folder") == 0
    out = capsys.readouterr().out
    assert "PEFT's folder" in out and "model.layers.*.self_attn.q_proj      2  LoRA        2      4" in out
    assert call("info folder --model llama") == 0
    assert call("info folder --model gpt2") == 1
    assert "does not have" in capsys.readouterr().out


def test_extract(here, capsys):
    assert call("merge --model llama --adapter llama-0 --adapter llama-1 --out tuned") == 0
    assert call("extract --model llama --tuned tuned --rank 5 --out all --json all.json") == 0
    out = capsys.readouterr().out
    assert "100.0%" in out and max(map(len, out.splitlines())) <= 80
    expected, found = models.load("tuned")[1], lora.merge(models.load("llama")[1], lora.load("all/adapter.safetensors"))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert call("extract --model llama --tuned tuned --rank 1 --out one --json one.json --targets .*/up/kernel") == 0
    held = json.loads((here / "one.json").read_text())["each"]["params/layers/mlp/up/kernel"]
    delta = np.asarray(expected["params"]["layers"]["mlp"]["up"]["kernel"]) - np.asarray(
        models.load("llama")[1]["params"]["layers"]["mlp"]["up"]["kernel"]
    )
    values = np.linalg.svd(delta, compute_uv=False)
    assert held["rest"] == pytest.approx(np.sqrt(np.sum(values[:, 1:] ** 2)), rel=1e-4)
    assert (here / "one" / "adapter_config.json").is_file()


@pytest.mark.parametrize("options", ["", "--method svd --rank 2", "--method ties_svd --density 0.5"])
def test_combine(here, options):
    assert call(f"combine --model llama --adapter llama-0=0.7 --adapter llama-1=0.3 --out both {options}") == 0
    keys = {"--method": ("method", str), "--rank": ("rank", int), "--density": ("density", float)}
    words = options.split()
    given = {keys[a][0]: keys[a][1](b) for a, b in zip(words[::2], words[1::2], strict=True)}
    one, two = (lora.load(f"llama-{i}/adapter.safetensors") for i in range(2))
    expected, found = lora.combine([one, two], [0.7, 0.3], **given), lora.load("both/adapter.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert peft.load("both", models.load("llama")[1], llama.NAMES).keys() == found.keys()


MERGE = "merge --model llama --adapter llama-0 --out new"
WRONG = {
    "merge --model none --adapter llama-0 --out new": "'none' is no directory",
    "merge --model empty --adapter llama-0 --out new": "config.json' is missing",
    "merge --model unknown --adapter llama-0 --out new": "model_type is 'mamba'; known are",
    "merge --model weightless --adapter llama-0 --out new": "has neither model.safetensors nor",
    "merge --model llama --adapter none --out new": "none: no such adapter",
    "merge --model llama --adapter llama --out new": "a model's directory, and no adapter",
    "merge --model llama --adapter llama/model.safetensors --out new": "not one that lora_jax.save wrote",
    "merge --model llama --adapter text.safetensors --out new": "no whole safetensors file",
    "merge --model llama --adapter cut.safetensors --out new": "no whole safetensors file",
    "merge --model llama --adapter halved --out new": "adapter_model.safetensors' is missing",
    "merge --model llama --adapter empty --out new": "neither adapter.safetensors nor adapter_config.json",
    "merge --model other --adapter llama-0 --out new": "made for another base, from which this one differs in 12 of 12",
    "merge --model gpt2 --adapter llama-0 --out new": "made for another base",
    "merge --model llama --adapter llama-0 --out half": "'half' is there already",
    "merge --model llama --adapter llama-0 --out text.safetensors": "'text.safetensors' is there already",
    "merge --model llama --adapter llama-0 --out no/such/new": "'no/such' is no directory: make it first",
    "merge --model llama --adapter llama-0=0 --out new": "the weight 0 is none",
    "merge --model llama --adapter llama-0=nan --out new": "the weight nan is none",
    "merge --model llama --adapter full.safetensors --adapter full.safetensors --out new": "trains in Full in 2 of the",
    f"{MERGE} --seed 3": "--seed does nothing with --round nearest",
    f"{MERGE} --round stochastic": "--round stochastic does nothing in float32",
    f"{MERGE} --dtype int8": "invalid choice: 'int8'",
    f"{MERGE} --force": "unrecognized arguments: --force",
    f"{MERGE} --json half/found/x.json": "no directory",
    f"{MERGE} --json new": "--json new: --out is written there",
    "extract --model llama --tuned other --rank 2 --out new --json new": "--out is written there",
    "convert --model llama --adapter llama-0 --to native --portable --out new": "--portable does nothing",
    "convert --model llama --adapter llama-0 --to native --out empty": "a folder, and a native adapter is a file",
    "convert --model llama --adapter mixed.safetensors --to peft --out new": "holds adapters of one kind",
    "convert --model llama --adapter full.safetensors --to peft --portable --out new": "servers read LoRA alone",
    "convert --model other --adapter llama-0 --to peft --out new": "made for another base",
    "info none": "none: no such adapter",
    "info llama": "a model's directory, and no adapter",
    "info cut.safetensors": "no whole safetensors file",
    "info llama-0 --model none": "'none' is no directory",
    "extract --model llama --tuned llama --rank 2 --out new": "there is nothing to extract",
    "extract --model llama --tuned gpt2 --rank 2 --out new": "give one model's",
    "extract --model llama --tuned other --rank 0 --out new": "no whole number of 1 or more",
    "extract --model llama --tuned other --rank 2 --targets x --out new": "'x' matches no path in full",
    "extract --model llama --tuned other --rank 2 --targets ( --out new": "is no regular expression",
    "combine --model llama --adapter llama-0 --out new --seed 2": "--seed does nothing with --method cat",
    "combine --model llama --adapter llama-0 --out new --rank 2": "does nothing with a rank",
    "combine --model llama --adapter llama-0 --out new --method ties": "needs a density",
    "combine --model llama --adapter llama-0 --out new --method mean": "invalid choice: 'mean'",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_line(here, capsys, line):
    before = sorted(path.name for path in here.iterdir())
    assert call(line) == 2
    out, err = capsys.readouterr()
    assert WRONG[line] in err and err.count("\n") == 1 and err.startswith(f"lora-jax {line.split()[0]}: ")
    assert not out and sorted(path.name for path in here.iterdir()) == before


def test_no_space(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert call(MERGE) == 2
    err = capsys.readouterr().err
    assert "new: not written (it takes " in err and " are free): free some space, or choose another disk" in err
    assert not (here / "new").exists() and not [*here.glob(".*")]

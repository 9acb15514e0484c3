"""PEFT's folders: what PEFT loads silently, and wrongly, is an error here or right; so is any damaged folder."""

from __future__ import annotations

import json
import random
import re
import time

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from checks import normal

import lora_jax as lora
from lora_jax.formats import peft
from lora_jax.formats.names import locate
from lora_jax.formats.peft import patterns, regex

PARAMS = {"embed": {"embedding": normal(10, 4)}, "head": {"kernel": normal(4, 10)}}
PARAMS |= {f"layers_{i}": {name: {"kernel": normal(4, 6, seed=i)} for name in ("q", "k", "up")} for i in (0, 1)}
NAMES = (
    ("embed", "model.embed_tokens", "embedding"),
    ("head", "lm_head", "linear"),
    (r"layers_(?P<layer>\d+)/(\w+)", r"model.layers.{layer}.\2_proj", "linear"),
)
PREFIX, Q0, Q1 = "base_model.model.", "model.layers.0.q_proj", "model.layers.1.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
TENSORS = {
    f"{PREFIX}{module}.lora_{x}.weight": np.asarray(normal(*shape, seed=i))
    for i, module in enumerate((Q0, Q1))
    for x, shape in (("A", (2, 4)), ("B", (6, 2)))
}
A0 = f"{PREFIX}{Q0}.lora_A.weight"


def write(folder, config=CONFIG, tensors=TENSORS, **fields):
    """A folder as PEFT writes it, without what a field of None would say."""
    folder.mkdir(exist_ok=True)
    config = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def load(folder, **fields):
    return peft.load(write(folder, **fields), PARAMS, NAMES)


def scale(lora_params, path="layers_0/q/kernel"):
    return lora_params[path].variant.scale


def test_what_peft_writes_loads(tmp_path):
    loaded = load(tmp_path)
    assert {*loaded} == {"layers_0/q/kernel", "layers_1/q/kernel"} and scale(loaded) == 3
    np.testing.assert_array_equal(loaded["layers_0/q/kernel"].factors["A"], TENSORS[A0].T)
    for config in ({"inference_mode": True, "unsloth_fixed": True}, {"peft_version": "0.3.0", "enable_lora": None}):
        chex.assert_trees_all_equal(load(tmp_path, **config, unheard_of=False), loaded)


def test_what_peft_writes_twice(tmp_path):
    head, table = np.asarray(PARAMS["head"]["kernel"]).T + 1, np.asarray(PARAMS["embed"]["embedding"])
    saved = {**TENSORS, f"{PREFIX}lm_head.weight": head}
    loaded = load(tmp_path, tensors=saved, modules_to_save=["lm_head"])
    copies = {"lm_head.modules_to_save.weight": head, "lm_head.original_module.weight": head - 1}
    copies = {f"{PREFIX}{name}": x for name, x in {**copies, "model.embed_tokens.weight": table}.items()}
    chex.assert_trees_all_equal(load(tmp_path, tensors={**saved, **copies}, modules_to_save=["lm_head"]), loaded)
    with pytest.raises(ValueError, match="differ"):
        load(tmp_path, tensors={**saved, **copies, f"{PREFIX}lm_head.weight": head + 1}, modules_to_save=["lm_head"])
    resized = load(tmp_path, tensors={**TENSORS, f"{PREFIX}model.embed_tokens.weight": table + 1})
    np.testing.assert_array_equal(resized["embed/embedding"].factors["weight"], table + 1)


def test_targets_that_are_excluded(tmp_path):
    """As PEFT writes all-linear: each module's name, and exclude_modules or modules_to_save beside."""
    load(tmp_path, target_modules=["q_proj", "model.layers.0.k_proj"], exclude_modules=["k_proj"])


def test_a_tied_table_is_saved_with_its_head(tmp_path):
    names = (("embed", "model.embed_tokens=lm_head", "embedding"), *NAMES[2:])
    params = {key: value for key, value in PARAMS.items() if key != "head"}
    table = np.asarray(PARAMS["embed"]["embedding"]) + 1
    both = {f"{PREFIX}{name}.weight": table for name in ("lm_head", "model.embed_tokens")}
    for name in both:
        write(tmp_path, tensors={**TENSORS, name: table}, modules_to_save=[name.split(".")[-2]])
        with pytest.raises(ValueError, match="tie_word_embeddings=False"):
            peft.load(tmp_path, params, names)
    write(tmp_path, tensors={**TENSORS, **both}, modules_to_save=["lm_head", "embed_tokens"])
    np.testing.assert_array_equal(peft.load(tmp_path, params, names)["embed/embedding"].factors["weight"], table)


def test_experts_that_are_leaves_by_their_own_names(tmp_path):
    params = {"up": normal(3, 4, 6), "up_bias": normal(3, 6), "down": normal(3, 6, 4)}
    names = (("(up|down)", r"mlp.experts.\1_proj", "experts"),)
    assert locate(params, names)["up_bias"].tensors == {(): "mlp.experts.up_proj_bias"}
    rules = {"up|down": lora.LoRA(2).at(batch_axes=0, in_axes=1, out_axes=2)}
    _, lora_params = lora.split(jax.random.key(0), params, rules)
    folder = peft.save(tmp_path / "new", lora_params, names)
    chex.assert_trees_all_equal(peft.load(folder, params, names), lora_params)


def test_a_part_of_a_module_is_saved_with_its_base(tmp_path):
    params = {name: {"kernel": normal(4, 4)} for name in "qkv"}
    names = tuple((name, f"qkv_proj[{i}]", "linear") for i, name in enumerate("qkv"))
    _, lora_params = lora.split(jax.random.key(0), params, {"k/kernel": lora.LoRA(2)})
    with pytest.raises(ValueError, match="'k/kernel' is a part.*base="):
        peft.save(tmp_path / "new", lora_params, names)
    assert peft.load(peft.save(tmp_path / "new", lora_params, names, base=params), params, names)["k/kernel"]


# What PEFT loads silently or with a warning, the adapter being off or another.
ODD = {
    "extra tensors": ({**TENSORS, f"{PREFIX}model.layers.7.q_proj.lora_A.weight": TENSORS[A0]}, "7.q_proj.*not have"),
    "a part of a module": ({**TENSORS, f"{PREFIX}{Q0}.lora_C.weight": TENSORS[A0]}, "lora_C"),
    "an unselected module": (
        {**TENSORS, **{name.replace("q_", "k_"): x for name, x in TENSORS.items()}},
        "k_proj.*target_modules.*do not select",
    ),
    "a module without": ({name: x for name, x in TENSORS.items() if Q1 not in name}, "select 'model.layers.1.q_proj'"),
    "a factor missing": ({name: x for name, x in TENSORS.items() if name != A0}, re.escape(A0.removeprefix(PREFIX))),
    "not a number": ({**TENSORS, A0: np.full((2, 4), np.nan, np.float32)}, "lora_A.*not finite"),
    "infinite": ({**TENSORS, A0: np.full((2, 4), np.inf, np.float16)}, "lora_A.*not finite"),
    "no prefix": ({name.removeprefix(PREFIX): x for name, x in TENSORS.items()}, "begin with 'base_model.model.'"),
    "another prefix": ({name.replace("base_model.", "", 1): x for name, x in TENSORS.items()}, "does not begin with"),
    "adapter names": ({n.replace(".weight", ".default.weight"): x for n, x in TENSORS.items()}, "lora_A"),
    "another layout": ({**TENSORS, A0: TENSORS[A0].T.copy()}, r"shape \(4, 2\)"),
    "another rank": ({**TENSORS, A0: TENSORS[A0][:1]}, r"shape \(1, 4\)"),
    "integers": ({**TENSORS, A0: np.ones((2, 4), np.int8)}, "is I8"),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("what", ODD)
def test_tensors_that_do_not_fit(what, tmp_path):
    tensors, message = ODD[what]
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path, tensors=tensors)
    assert str(tmp_path) in str(raised.value)


FIELDS = {
    "target_modules": [
        (["q_proj", "nope"], "name 'nope'"), (None, "has no target_modules.*PEFT"), (".*k_proj", "do not select"),
        (["q_proj", "up_proj"], "select 'model.layers.0.up_proj'"), ("(", "pattern"), ([1], "list of names"),
        ("all-linear", "select"), (r"(.*)\1", "not supported"), ("(?i)Q_PROJ", "not supported"),
    ],
    "r": [(None, "no r, for which PEFT"), (4, "rank"), *((x, "its r is") for x in (0, -1, True, "2", 2.5, 10**400))],
    "lora_alpha": [(None, "no lora_alpha, for which PEFT would take 8"), (10**400, "alpha"), ("6", "number")],
    "peft_type": [("PROMPT_TUNING", "what can be loaded is LORA"), (None, "peft_type"), ([], "peft_type")],
    "rank_pattern": [({"q_proj": 1}, "shape"), ({"(": 1}, "pattern"), ({"q_proj": -1}, "ranks by pattern")],
    "alpha_pattern": [({"q_proj": "6"}, "numbers by pattern"), ([], "numbers by pattern")],
    "exclude_modules": [(["0.q_proj"], "do not select")],
    "layers_to_transform": [(1, "do not select"), ("1", "number"), ([-1], "number")],
    "modules_to_save": [(["layers"], "do not select")],
    "use_dora": [(True, "lora_magnitude_vector"), ("yes", "true or false")],
    "use_qalora": [(True, "pools the inputs")], "layer_replication": [([[0, 2]], "repeats layers")],
    "trainable_token_indices": [([1], "rows of the embedding")], "kasa_config": [({"beta": 1.0}, "singular")],
    "megatron_config": [({"x": 1}, "Megatron")], "alora_invocation_tokens": [([1, 2], "tokens after")],
    "init_lora_weights": [(x, "changed base.*path_initial_model") for x in ("pissa_niter_4", "OLoRA", "corda")]
    + [("loftq", "changed base: load that base")],
    "use_dorra": [(True, "no such field.*use_dora")], "new_scale": [(2.0, "may change what")],
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_change_what_it_does(field, tmp_path):
    for value, message in FIELDS[field]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **{field: value})


def test_alpha_is_the_files_and_one_that_was_changed_after_saving_is_told(tmp_path):
    """PEFT keeps a scale nowhere but in its configuration; our file has a sum of that, which PEFT does not look at."""
    assert scale(load(tmp_path / "peft", lora_alpha=8)) == 4
    folder = peft.save(tmp_path / "ours", load(tmp_path / "peft"), NAMES)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change in ({"lora_alpha": 12}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match="put that back"):
            peft.load(folder, PARAMS, NAMES)
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "moved", "bias": "none"})
    )
    assert scale(peft.load(folder, PARAMS, NAMES)) == 3


def test_patterns_are_as_pefts(tmp_path):
    loaded = load(tmp_path, alpha_pattern={r"^model\.layers\.0": 1, r"layers\.0\.q_proj": 4, "q_proj": 2, ".*": 8})
    assert (scale(loaded), scale(loaded, "layers_1/q/kernel")) == (2, 1)
    for targets in (r".*\.(q|v)_proj", r"model\.layers\.\d+\.q_proj", r"^(?!.*vision).*\.(?:q_proj|o_proj)$", UNSLOTH):
        assert len(load(tmp_path, target_modules=targets)) == 2
    assert len(load(tmp_path, target_modules=[Q0, Q1], layers_to_transform=[5], layers_pattern="layers")) == 2


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:(?:q_proj|v_proj)))"
)
EVIL = (
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    "(.*a){20}b",
    "(" * 400,
    "a{1,99999}" * 99,
    "((a{1,99}){1,99}){1,99}b",
    "(?:a|" * 45 + ")" * 45,
)


def test_patterns_match_in_bounded_time(monkeypatch):
    """Where Python's own would take longer than there has been time."""
    start, names = time.process_time(), ["a" * 60, "model.layers.0.a"]
    for pattern in EVIL:
        for config in ({"target_modules": pattern}, {"target_modules": [], "modules_to_save": [pattern]}):
            try:
                patterns.selected(config, names)
                patterns.lookup({f"{i}{pattern}": 1 for i in range(20)}, names)
            except ValueError as raised:
                assert "give names instead" in str(raised)
    assert time.process_time() - start < 5
    with pytest.raises(ValueError, match="more than 2000 patterns"):
        patterns.lookup({f"a+{i}": 1 for i in range(2001)}, names)
    monkeypatch.setattr(regex, "STEPS", 1000)
    for many in ({"(a|b)+": 1, **{f"(a|b){i}": 1 for i in range(99)}}, {f"{'.' * i}a": 1 for i in range(2000)}):
        with pytest.raises(ValueError, match="too long to match"):
            patterns.lookup(many, ["c" * 9 for _ in range(99)])


@pytest.mark.parametrize("seed", range(2))
def test_patterns_match_as_pythons(seed):
    rng, parts = (
        random.Random(seed),
        r"a b . \. [ab] [^a] \d \w \b ^ $ 1 ( (?: (?= (?! ) ) ) | | * + ? *? {2} {,2} {1,}".split(),
    )
    for _ in range(1500):
        pattern = "".join(rng.choice(parts) for _ in range(rng.randrange(1, 9)))
        try:
            tree = regex.parse(pattern)
        except ValueError:
            continue
        for name in ("a", "ab.1", "aab", "1a.b"):
            assert regex.matches(tree, name, regex.steps()) == bool(re.fullmatch(pattern, name)), (pattern, name)
            assert regex.matches(tree, name, regex.steps(), whole=False) == bool(re.match(pattern, name)), (
                pattern,
                name,
            )

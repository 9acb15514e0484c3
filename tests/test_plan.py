"""Plans: parts that add up, FLOPs of the closed form, loops that count, and what the command line says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import cli
from lora_jax.models.llama import Config
from lora_jax.plan.chips import CHIPS, Chip, roofline
from lora_jax.plan.collectives import Collective, bytes_sent, collectives
from lora_jax.plan.flops import matrix_bytes, matrix_flops
from lora_jax.plan.memory import Memory
from lora_jax.plan.plan import plan, smallest
from lora_jax.plan.report import report_smallest
from lora_jax.plan.step import FROZEN, TARGETS, Job

pytestmark = pytest.mark.standard_promotion

RANK = 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SHAPES = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
# What A and B have of the axes that "fsdp" and "tp" split: in and out of most kernels, out and in of output and down.
OVER_FSDP = sum(d for d, _ in SHAPES[:3] + SHAPES[4:6]) + sum(k for _, k in (SHAPES[3], SHAPES[6]))
OVER_TP = sum(map(sum, SHAPES)) - OVER_FSDP
TOKENS, PRODUCT = 4 * 128, 2 * 128 * 128  # FLOPs a token of queries with keys, and of what comes of it with values
ATTENTION = 3 * (2 + 4 + 1) * PRODUCT  # forward, backward, and the first of them once more
# 6nr(d + k); once more (x·A)·B, but the last; and attention's result, which is what the output's A multiplies.
FACTORS = TOKENS * 3 * (sum(6 * RANK * (d + k) + 2 * RANK * k for d, k in SHAPES) - 2 * RANK * 128 + PRODUCT)
TINY = Config.from_huggingface(CONFIG)


LORA = {TARGETS["all-linear"]: lora.LoRA(RANK)}
JOB = Job(TINY, {"fsdp": 4, "tp": 2}, 4, 128, rules=LORA, dtype="float32")


@functools.cache
def on_one_device():
    return plan(dataclasses.replace(JOB, mesh={}))


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """What the command prints, and what it writes, for `JOB`."""
    folder, shown = tmp_path_factory.mktemp("plan"), io.StringIO()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arguments = [str(folder), "--mesh", "fsdp=4,tp=2", "--batch", "4", "--length", "128", "--rank", "4"]
    arguments += ["--chip", "v5p,H100", "--json", str(folder / "plan.json")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setenv("XLA_FLAGS", "")  # which the command adds to
        assert cli.main(["plan", *arguments]) == 0
    return shown.getvalue(), json.loads((folder / "plan.json").read_text())


def test_parts_add_up(commanded):
    """On 4 × 2 devices: kernels are split over all, norms over none, A and B over one axis each."""
    _, found = commanded
    held = found["bytes_per_device"]
    kernels = 3 * sum(d * k for d, k in SHAPES) + 2 * 512 * 128
    norms = (2 * 3 + 1) * 128
    assert found["parameters"] == kernels + norms
    assert held["base"] == 2 * (kernels // 8 + norms)
    assert found["trained"] == 3 * RANK * (OVER_FSDP + OVER_TP)
    assert held["factors"] == 4 * 3 * RANK * (OVER_FSDP // 4 + OVER_TP // 2)
    assert 0 <= held["optimizer"] - 2 * held["factors"] <= 16  # and two counts of steps
    assert held["batch"] == 4 * 128 * 4 // 4
    assert 0 <= held["other"] < 2000 < held["temporaries"]
    assert held.pop("total") == sum(held.values())


def test_flops_are_those_of_the_closed_form(commanded):
    """4ndk + 6nr(d + k) for each kernel, 4ndV for the head, attention, and what the backward pass makes anew.

    Along "tp", where the rank is whole, what is of rank columns is done by every device.
    """
    linear = 3 * sum(4 * d * k for d, k in SHAPES)
    assert on_one_device().flops == pytest.approx(TOKENS * (linear + 4 * 512 * 128 + ATTENTION) + FACTORS, rel=1e-3)
    everywhere = TOKENS * 3 * 6 * RANK * OVER_FSDP
    assert commanded[1]["flops"] == pytest.approx(on_one_device().flops + everywhere, rel=0.005)


def test_a_loop_counts_as_often_as_it_goes_round():
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,))
    kernels = [(jnp.ones((5, 64, 128)), P(None, None, "tp")), (jnp.ones((5, 128, 64)), P(None, "tp"))]
    kernels = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x, spec in kernels]
    rules = {".*": lora.LoRA(2).at(batch_axes=0, in_axes=1, out_axes=2)}
    lora_params = jax.eval_shape(lambda w: lora.split(jax.random.key(0), w, rules)[1], kernels)

    def compiled(unroll):
        def loss(kernels, x):
            def layer(x, w):
                return x + jnp.tanh(x @ w[0]) @ w[1], None

            return jnp.sum(lax.scan(layer, x, tuple(kernels), unroll=unroll)[0] ** 2)

        step = jax.grad(lambda lp, kernels, x: lora.lift(loss)(lora.attach(kernels, lp), x))
        own = lora.shardings(lora_params, kernels)
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lora_params, own)
        return jax.jit(step, out_shardings=own).lower(shapes, kernels, jnp.ones((16, 64))).compile()

    scanned, unrolled = compiled(1), compiled(5)
    # Unrolled, the first layer's input needs no gradient: its two products, of W and of AB.
    saved = 2 * 16 * (64 * 16) + 2 * 16 * 2 * (64 + 16)
    assert matrix_flops(scanned) == pytest.approx(matrix_flops(unrolled) + saved, rel=0.01)
    assert bytes_sent(collectives(scanned)) == pytest.approx(bytes_sent(collectives(unrolled)), rel=0.15)
    assert matrix_bytes(scanned) == pytest.approx(matrix_bytes(unrolled), rel=0.15)


def test_products_of_one_column_in_bfloat16():
    """Of which XLA's CPU backend has none."""
    tiny = Config(64, 16, 1, 2, 32)
    found = plan(Job(tiny, {}, 1, 8, rules={TARGETS["attention"]: lora.LoRA(1)}))
    assert found.trained == 4 * 2 * 16 and not found.exact


def test_a_frozen_model_s_own_pass_is_next_to_it():
    frozen = plan(dataclasses.replace(JOB, mesh={}, rules=FROZEN))
    assert frozen.trained == 3 * 128
    assert frozen.flops == pytest.approx(on_one_device().flops - FACTORS, rel=1e-3)


def test_the_smallest_mesh_that_holds_it(monkeypatch):
    def imagined(job):
        memory = Memory(0, 0, 0, 0, 1000 // job.devices, 0)
        return dataclasses.replace(on_one_device(), job=job, memory=memory)

    monkeypatch.setattr("lora_jax.plan.plan.plan", imagined)
    chips = {str(size): Chip(1e12, size, 1e12, 1e9, 8, 1e9) for size in (2000, 300, 140, 10)}
    found = smallest(JOB, chips)
    assert {name: dict(made.job.mesh) for name, made in found.items()} == {
        "2000": {"fsdp": 1, "tp": 1},
        "300": {"fsdp": 4, "tp": 1},
        "140": {"fsdp": 4, "tp": 2},
    }
    shown = report_smallest(JOB, found, chips)
    assert "more than 16" in shown and max(map(len, shown.splitlines())) <= 80


def test_a_roofline_by_hand():
    chip = Chip(flops=100.0, memory=1.0, bandwidth=10.0, link=8.0, node=8, network=2.0)
    arrays = (jax.ShapeDtypeStruct((4,), "float32"),)
    of_two, of_eight = (Collective("collective-broadcast", arrays, arrays, group) for group in (2, 8))
    inside = roofline(chip, 60.0, 20.0, [of_eight], {"fsdp": 8})
    assert (inside.compute, inside.memory, inside.network) == (1.0, 2.0, 2.0)
    assert (inside.overlapped, inside.in_turn) == (2.0, 4.0)
    # Of 16 devices, pairs along the last axis stay in a node of 8, and groups of 8 along another may not.
    across = roofline(chip, 60.0, 20.0, [of_two, of_eight], {"fsdp": 8, "tp": 2})
    assert across.network == 2.0 + 8.0
    # Of two nodes, those along the last axis of more than one device are each in one.
    assert roofline(chip, 60.0, 20.0, [of_two, of_eight], {"data": 2, "fsdp": 8, "tp": 1}).network == 8.0 + 2.0


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # which the command adds to
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


def test_the_command_says_what_the_plan_is(commanded):
    shown, written = commanded
    assert max(map(len, shown.splitlines())) <= 80
    assert ("holds bfloat16 activations" in shown) is not written["bfloat16_compiled_as_such"]
    assert "LoRA of rank 4 on all-linear" in shown and "8 devices (fsdp=4,tp=2)" in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith(("v5", "H1", "v6"))] == ["v5p", "H100"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "fsdp=8,tp"], "--mesh fsdp=8,tp: 'tp' is no axis with its size"),
        (["--mesh", "fsdp=0"], "'fsdp=0' is no axis"),
        (["--mesh", "expert=8"], "the mesh has an axis 'expert': its axes are data, fsdp, tp"),
        (["--mesh", "tp=8"], "tp=8 does not divide num_key_value_heads, 4"),
        (["--mesh", "fsdp=3", "--batch", "3"], "fsdp=3 does not divide hidden_size, 128"),
        (["--mesh", "fsdp=8", "--batch", "4"], "a batch of 4 is split over data × fsdp = 8"),
        (["--length", "4096"], "a length of 4096 is more than 2048 positions"),
        (["--chip", "H100,A1"], "--chip A1: the chips are H100"),
        (["--variant", "lora"], "--variant lora: the variants are"),
        (["--remat", "some"], "invalid choice: 'some'"),
        (["--rank", "0"], "'0' is no whole number"),
        (["--mesh", "fsdp=2", "--targets", "query"], "the rule 'query' matches no path"),
        (["--mesh", "fsdp=2", "--rank", "1000"], "rank"),
        (["--mesh", "fsdp=16", "--batch", "16"], "the mesh has 16 devices and JAX 8"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, config, capsys):
    try:
        status = cli.main(["plan", str(config), *arguments])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    assert message in shown.err and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json' is no file and no directory: give"),
        ("not JSON", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "gpt2"}', "model_type is 'gpt2'"),
        ('{"model_type": "llama"}', "config.json lacks vocab_size"),
    ],
)
def test_a_config_that_is_none_is_one_line(content, message, config, capsys):
    config.unlink() if content is None else config.write_text(content)
    assert cli.main(["plan", str(config)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1


def test_chips_are_in_the_units_they_say():
    assert all(chip.link >= chip.network and chip.bandwidth > chip.link for chip in CHIPS.values())

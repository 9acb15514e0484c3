"""The harness: its step is the one that a user would write, its runs resume, and it says what it was given wrong."""

from __future__ import annotations

import functools
import itertools
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import equations, error, normal, randomized

import lora_jax as lora
from lora_jax import training
from lora_jax.formats.orbax import Checkpoints
from lora_jax.training.interruption import interruptions

pytestmark = pytest.mark.standard_promotion  # Adam's

B, T, D, C = 8, 64, 16, 4
PARAMS = {
    "w": normal(D, D, scale=0.3),
    "v": normal(D, C, seed=1, scale=0.3),
    "b": normal(C, seed=2),
    "far": jnp.array(1e6),
}
RULES = {"w|v": lora.LoRA(rank=2), "b": lora.Full()}
KEY = jax.random.key(0)
FROZEN, LORA_PARAMS = lora.split(KEY, PARAMS, RULES)
LORA_PARAMS = randomized(LORA_PARAMS)
TX = lora.optimizer(optax.adam(1e-2))
TRACES = []


def batch(seed=0, mask=None):
    mask = np.ones((B, T), np.float32) if mask is None else mask
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(B, T, D)).astype(np.float32),
        "y": rng.normal(size=(B, T, C)).astype(np.float32),
        "mask": mask,
    }


BATCHES = [batch(i) for i in range(6)]


def errors(params, batch):
    """Of each token. What it adds of `far`, which is frozen, is 0, and has a huge gradient."""
    y = jnp.tanh(batch["x"] @ params["w"]) @ params["v"] + params["b"]
    return jnp.sum((y - batch["y"]) ** 2, -1) + 1e6 * (params["far"] - 1e6)


def loss_fn(params, batch):
    """Divides by the number of tokens."""
    TRACES.append(batch)
    return (errors(params, batch) * batch["mask"]).sum() / batch["mask"].sum()


def tokens(part):
    return part["mask"].sum()


def drawn(params, batch, key):
    """A loss that draws a number, and tells what."""
    u = jax.random.uniform(key)
    return errors(params, batch).mean(), {"u": u, "uu": u * u}


@functools.cache
def made(**options):
    """A step, compiled once for all tests."""
    return training.make_step(loss_fn, TX, **options)


def created(lora_params=LORA_PARAMS, tx=TX):
    return training.State.create(KEY, lora_params, tx)


def ran(step, batches, state, frozen=FROZEN):
    """The state after steps on batches, and the metrics of each."""
    found = []
    for each in batches:
        state, metrics = step(state, frozen, each)
        found.append({name: float(x) for name, x in metrics.items()})
    return state, found


# The step


def test_the_step_is_the_one_that_a_user_writes():
    """Of all variants at once: the same numbers, FLOPs and bytes, and the norm that clips is that of what trains."""
    variants = {
        "lora": lora.LoRA(2),
        "dora": lora.DoRA(2),
        "adalora": lora.AdaLoRA(2),
        "vera": lora.VeRA(2),
        "lora_fa": lora.LoRAFA(2),
        "full": lora.Full(),
    }
    params = {**PARAMS, **{name: normal(D, D, seed=i, scale=0.3) for i, name in enumerate(variants)}}
    frozen, lora_params = lora.split(KEY, params, variants)
    lora_params, tx, most = randomized(lora_params), lora.optimizer(optax.sgd(0.1)), 0.5
    state, labels = created(lora_params, tx), {path: x.variant.labels() for path, x in lora_params.items()}

    def deep(params, batch):
        for name in variants:
            batch = {**batch, "x": batch["x"] + jnp.tanh(batch["x"] @ params[name])}
        return loss_fn(params, batch)

    def by_hand(lora_params, opt_state, frozen, batch):
        def objective(lora_params):
            return lora.lift(deep)(lora.attach(frozen, lora_params), batch)

        loss, grads = jax.value_and_grad(objective)(lora_params)
        norm = jnp.sqrt(sum(jnp.sum(x**2) for x in trained(grads)))
        grads = jax.tree.map(lambda x: x * jnp.minimum(1, most / norm), grads)
        updates, opt_state = tx.update(grads, opt_state, lora_params)
        return optax.apply_updates(lora_params, updates), opt_state, loss, norm

    def trained(adapters):
        pairs = [(labels[path].get(name), x) for path, a in adapters.items() for name, x in a.factors.items()]
        return [x for label, x in pairs if label not in ("frozen", None)]

    expected = jax.jit(by_hand, donate_argnums=(0, 1)).lower(state.lora_params, state.opt_state, frozen, BATCHES[0])
    step = training.make_step(deep, tx, clip_norm=most).lower(state, frozen, BATCHES[0])
    expected, step = expected.compile(), step.compile()
    for cost in ("flops", "bytes accessed"):
        assert step.cost_analysis()[cost] == pytest.approx(expected.cost_analysis()[cost], rel=1e-3)

    state, metrics = step(state, frozen, BATCHES[0])
    factors, _, loss, norm = expected(*jax.tree.map(jnp.copy, (lora_params, tx.init(lora_params))), frozen, BATCHES[0])
    assert norm > most
    assert error((metrics["loss"], metrics["grad_norm"]), (loss, norm)) < 1e-6
    assert error(state.lora_params, factors) < 1e-6
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, lora_params, state.lora_params)
    moved = [optax.tree.norm(x) for x in (moved, trained(moved))]
    np.testing.assert_allclose(moved, most, rtol=1e-4)


def test_parts_add_up_to_the_whole_batch():
    """By the tokens of each; of parts with different numbers of them, the plain mean is another loss."""
    lengths = np.arange(1, B + 1)[:, None] ** 2  # of 1 to 64 tokens
    unequal = [batch(i, (np.arange(T) < lengths).astype(np.float32)) for i in range(4)]
    for batches, options in ((BATCHES[:4], {}), (unequal, {"weight": tokens})):
        whole, expected = ran(made(), batches, created())
        parts, found = ran(made(accumulate=4, **options), batches, created())
        assert error(found, expected) < 1e-6
        assert error(parts.lora_params, whole.lora_params) < 1e-6
    plainly, found = ran(made(accumulate=4), unequal, created())
    assert error(found, expected) > 1e-3 < error(plainly.lora_params, whole.lora_params)


def test_a_part_without_tokens_and_sums_beyond_float16_do_no_harm():
    """The loss of no tokens is 0/0; and float16 ends at 65,504, which neither a weight nor a square need keep to."""
    tx, mask = lora.optimizer(optax.sgd(1.0)), np.ones((B, T), np.float32)
    mask[1::2] = 0.0  # every second example, thus one part of two
    half = jax.tree.map(jnp.float16, LORA_PARAMS)
    options = {"weight": lambda part: 1e5 * tokens(part), "accumulate": 2, "clip_norm": 1e-2}
    step = training.make_step(lambda params, batch: 1000 * loss_fn(params, batch), tx, **options)
    expected, (metrics,) = ran(step, [batch(0, mask)], created(tx=tx))
    found, _ = ran(step, [batch(0, mask)], created(half, tx))
    assert metrics["grad_norm"] > 256  # whose square is beyond
    moved = [jax.tree.map(lambda a, b: jnp.float32(a) - b, x.lora_params, LORA_PARAMS) for x in (expected, found)]
    assert optax.tree.norm(moved[0]) == pytest.approx(1e-2, rel=1e-3)
    assert error(*moved) < 0.1
    evaluated = training.evaluate(loss_fn, FROZEN, LORA_PARAMS, [batch(0), batch(1, 0 * mask)], weight=tokens)
    assert evaluated == training.evaluate(loss_fn, FROZEN, LORA_PARAMS, [batch(0)])


def test_bfloat16_is_for_what_is_computed_and_a_base_that_has_it_is_not_copied():
    step = training.make_step(loss_fn, TX, dtype=jnp.bfloat16)
    for frozen, casts in ((FROZEN, True), (jax.tree.map(jnp.bfloat16, FROZEN), False)):
        jaxpr, (state, metrics) = jax.make_jaxpr(step, return_shape=True)(created(), frozen, BATCHES[0])
        products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
        assert {v.aval.dtype for eqn in products for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
        converted = [e.invars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "convert_element_type"]
        assert ((D, D) in converted) == casts
        assert [x.dtype for x in jax.tree.leaves(state)] == [x.dtype for x in jax.tree.leaves(created())]
        assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}


def test_a_step_donates_its_state_and_nothing_of_the_user_s():
    dog = optax.contrib.dog()  # whose state begins as the parameters themselves
    for step, state in ((made(), created()), (training.make_step(loss_fn, dog), created(tx=dog))):
        after, _ = step(state, FROZEN, BATCHES[0])
        assert all(x.is_deleted() for x in jax.tree.leaves(state.lora_params))
        assert not any(x.is_deleted() for x in jax.tree.leaves((after, LORA_PARAMS, FROZEN, KEY)))


def test_masks_and_keys_are_others_in_each_step_and_each_part(tmp_path):
    _, lora_params = lora.split(KEY, PARAMS, {"w|v": lora.LoRA(rank=2, dropout=0.5)})
    lora_params = randomized(lora_params)
    tx = lora.optimizer(optax.sgd(0.0))  # so that a loss depends on the mask alone
    step = training.make_step(drawn, tx, has_aux=True, needs_key=True, accumulate=2)
    _, found = ran(step, [BATCHES[0]] * 4, created(lora_params, tx))
    assert len({metrics["u"] for metrics in found}) == len({metrics["loss"] for metrics in found}) == 4
    assert all(metrics["uu"] - metrics["u"] ** 2 > 1e-6 for metrics in found)  # the parts' variance
    again, same = ran(step, [BATCHES[0]] * 2, created(lora_params, tx))
    with Checkpoints(tmp_path, FROZEN) as checkpoints:
        checkpoints.save(2, again)
        again = checkpoints.restore(created(lora_params, tx))
    _, rest = ran(step, [BATCHES[0]] * 2, again)
    assert same + rest == found


# Evaluation


def test_evaluation_counts_by_weight_compiles_once_and_drops_nothing():
    unequal = [batch(0), batch(1, np.tri(B, T, dtype=np.float32))]
    _, dropped = lora.split(KEY, PARAMS, {"w|v": lora.LoRA(rank=2, dropout=0.5)})

    def measured(params, batch):
        TRACES.append(batch)
        found = errors(params, batch) * batch["mask"]
        return {"error": found.sum() / batch["mask"].sum(), "one": jnp.ones((), jnp.bfloat16)}

    def expected(lora_params):
        params = lora.merge(FROZEN, lora_params)
        sums = [float((errors(params, each) * each["mask"]).sum()) for each in unequal]
        return sum(sums) / sum(float(each["mask"].sum()) for each in unequal)

    for lora_params in (randomized(dropped, seed=1), randomized(dropped, seed=2)):
        before = len(TRACES)
        found = training.evaluate(measured, FROZEN, lora_params, iter(unequal), weight=tokens)
        assert found == {"error": pytest.approx(expected(lora_params), rel=1e-5), "one": 1.0}
    assert len(TRACES) == before
    aux = training.evaluate(lambda *args: (jnp.float32(2), measured(*args)), FROZEN, dropped, unequal[:1])
    assert aux.keys() == {"loss", "error", "one"} and aux["loss"] == 2
    with pytest.raises(ValueError, match=r"fun returns a scalar, .* not float32\[8, 64\]"):
        training.evaluate(errors, FROZEN, dropped, unequal)
    with pytest.raises(ValueError, match="there are no batches"):
        training.evaluate(measured, FROZEN, lora_params, [])


# The loop


def test_fit_compiles_once_calls_hooks_in_turn_and_goes_on(tmp_path):
    said, seen = [], []

    def told(step, state, metrics):
        seen.append((step, int(state.step), sorted(metrics)))

    each = [
        training.hooks.every(2, training.hooks.evaluation(lambda lora_params: {"loss": 1.0})),
        told,
        training.hooks.every(4, training.hooks.log(said.append)),
    ]
    step = made()
    whole, _ = ran(step, 2 * BATCHES, created())
    before = len(TRACES)
    for steps in (8, 8, 12):  # the second has nothing to do
        with Checkpoints(tmp_path, FROZEN, every=3) as checkpoints:
            data = itertools.cycle(BATCHES)  # a plain iterator: what was taken is passed over
            state = training.fit(step, created(), FROZEN, data, steps=steps, hooks=each, checkpoints=checkpoints)
        assert int(state.step) == steps
        assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} == (
            {6, 8} if steps == 8 else {9, 12}
        )
    step(created(randomized(LORA_PARAMS, seed=1)), FROZEN, BATCHES[0])
    assert len(TRACES) == before and step._cache_size() == 1
    assert error(state.lora_params, whole.lora_params) == 0
    assert [(a, b) for a, b, _ in seen] == [(i, i) for i in range(1, 13)]
    assert [names for _, _, names in seen[:2]] == [["grad_norm", "loss"], ["eval_loss", "grad_norm", "loss"]]
    assert [line.partition(":")[0] for line in said] == ["step 4", "step 8", "step 12"] and "eval_loss 1" in said[0]


def test_an_iterator_stands_where_the_state_does_and_metrics_stay_as_a_hook_saw_them(tmp_path):
    taken, history = itertools.count(), []
    data = (BATCHES[next(taken) % 6] for _ in iter(int, 1))
    hooks = [lambda step, state, metrics: history.append(metrics), lambda *_: {"later": 1.0}]
    whole, _ = ran(made(), BATCHES, created())
    state = created()
    for steps in (3, 6):  # with one iterator
        state = training.fit(made(), state, FROZEN, data, steps=steps, hooks=hooks)
    assert error(state.lora_params, whole.lora_params) == 0 and next(taken) == 6
    assert [{*metrics} for metrics in history] == [{"loss", "grad_norm"}] * 6
    with Checkpoints(tmp_path, FROZEN) as checkpoints:
        training.fit(made(), created(), FROZEN, BATCHES, steps=2, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="newest checkpoint is of step 2, and the state has taken 6 already"):
            training.fit(made(), state, FROZEN, 2 * BATCHES, steps=8, checkpoints=checkpoints)
    with pytest.raises(TypeError, match="returned 'no': hooks return metrics"):
        training.fit(made(), created(), FROZEN, BATCHES, steps=1, hooks=[lambda *_: "no"])


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptions() as asked:
            signal.raise_signal(signal.SIGINT)
            assert asked(1) is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_early_stopping_resumes(tmp_path):
    losses = [3.0, 2.0, 2.5, float("nan"), 1.5, 1.9, 1.8, 1.7, 1.6]

    def fit(steps):
        def found(step, state, metrics):
            return {"eval_loss": losses[step - 1]}

        stopping = training.hooks.every(1, training.hooks.EarlyStopping(patience=3))
        with Checkpoints(tmp_path, FROZEN, every=1) as checkpoints:
            data = itertools.cycle(BATCHES)
            return training.fit(
                made(), created(), FROZEN, data, steps=steps, hooks=[found, stopping], checkpoints=checkpoints
            )

    assert [int(fit(steps).step) for steps in (3, 4, 6, 9, 9)] == [3, 4, 6, 8, 8]


class Rows:
    """A source for grain, which knows one from another by its repr."""

    def __len__(self):
        return 10 * B

    def __getitem__(self, i):
        return {name: x[i % B] for name, x in BATCHES[i // B % 6].items()}

    def __repr__(self):
        return "Rows()"


def loader():
    sampler = grain.samplers.IndexSampler(10 * B, shuffle=True, seed=0, shard_options=grain.sharding.NoSharding())
    return grain.DataLoader(data_source=Rows(), sampler=sampler, operations=[grain.transforms.Batch(B)])


def dataset():
    return grain.MapDataset.source(Rows()).seed(0).shuffle().batch(B).to_iter_dataset()


@pytest.mark.parametrize("data", [loader, dataset])
def test_grain_s_iterators_go_on_where_they_were(data, tmp_path):
    expected = training.fit(made(), created(), FROZEN, data(), steps=5)
    for steps in (2, 5):
        with Checkpoints(tmp_path, FROZEN) as checkpoints:
            state = training.fit(made(), created(), FROZEN, data(), steps=steps, checkpoints=checkpoints)
    assert error(state.lora_params, expected.lora_params) == 0


# What does not fit


def test_the_data_ends_too_early():
    with pytest.raises(ValueError, match="the data ended after 6 of 7 steps: take fewer, or repeat the data"):
        training.fit(made(), created(), FROZEN, BATCHES, steps=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, r"accumulate=0\): a batch has one part at least"),
        ({"accumulate": 3}, "'batch/mask' of the batch has shape .* 3 parts do not divide: take batches of a multiple"),
        ({"clip_norm": 0.0}, r"clip_norm=0.0\): the norm is positive, or None"),
        ({"clip_norm": float("nan")}, r"clip_norm=nan\)"),
        ({"dtype": "int8"}, r"dtype='int8'\): what it computes in is a floating dtype"),
        ({"shardings": {"w": None}}, r"shardings=...\): they are of a State"),
        ({"weight": lambda part: part["mask"].sum(-1)}, r"weight\(batch\) is one number, .* has shape \(8,\)"),
        ({"has_aux": True}, r"has_aux=True\): loss_fn returns \(loss, metrics\).* this one returns float32\[\]"),
        ({"loss_fn": errors}, r"has_aux=False\): loss_fn returns a scalar.* this one returns float32\[8, 64\]"),
        ({"loss_fn": lambda *args: (loss_fn(*args), {})}, r"a scalar, or with has_aux=True \(loss, metrics\)"),
        ({"loss_fn": lambda *args: (loss_fn(*args), {"x": args[1]["x"]}), "has_aux": True}, "a dict of scalars"),
        ({"loss_fn": lambda *args: jnp.int32(loss_fn(*args))}, r"int32\[\], which has no gradient"),
        ({"loss_fn": lambda *args: (loss_fn(*args), {"stop": 1.0}), "has_aux": True}, r"have \['stop'\]"),
        ({"loss_fn": lambda *args: (loss_fn(*args), {"name": "x"}), "has_aux": True}, "a dict of scalars; .* 'str'"),
        (
            {"loss_fn": lambda *args: (loss_fn(*args), {"loss": 1.0}), "has_aux": True},
            r"have \['loss'\], which the harness says",
        ),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        step = training.make_step(**{"loss_fn": loss_fn, "tx": TX, **options})
        jax.eval_shape(step, created(), FROZEN, BATCHES[0])

"""`lift` commutes with JAX's transforms, over it and under it, and keeps what a program does besides computing."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import all_adaptable, equations, error, normal, randomized
from in_numpy import in_numpy
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify, io_callback
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora

KEY = jax.random.key(0)
PARAMS = {
    "up": normal(8, 16, seed=1, scale=0.3),
    "down": normal(16, 8, seed=2, scale=0.3),
}
X = normal(16, 8, seed=3)
FROZEN, INITIAL = jax.jit(lambda params: lora.split(KEY, params, {".*": lora.LoRA(rank=2, alpha=4)}))(PARAMS)
LORA_PARAMS = randomized(INITIAL, 0.2)
ATTACHED, MERGED = lora.attach(FROZEN, LORA_PARAMS), jax.jit(lora.merge)(FROZEN, LORA_PARAMS)
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
ALL, ROWS, COLUMNS = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")


def model(params, x):
    return x + jnp.tanh(checkpoint_name(x @ params["up"], "hidden")) @ params["down"]


def lifted(lora_params, x, fun=model):
    return lora.lift(fun)(lora.attach(FROZEN, lora_params), x)


def merged(lora_params, x, fun=model):
    return fun(lora.merge(FROZEN, lora_params), x)


def loss(fun):
    return lambda *args: jnp.sum(jnp.sin(fun(*args)))


def stacked(lora_params, n=3):
    """Several adapters, each another multiple of the first."""
    return jax.tree.map(lambda x: jnp.multiply.outer(jnp.arange(1.0, n + 1), x), lora_params)


def repeated(fun):
    return lambda lp, x: lax.scan(lambda x, _: (fun(lp, x), None), x, length=3)[0]


def looped(fun):
    return lambda lp, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, fun(lp, c[1])), (0, x))[1]


def associative(fun):
    return lambda lp, x: lax.associative_scan(lambda a, b: fun(lp, a) + b, x[:4])


def mapped(fun):
    return lambda lp, x: lax.map(functools.partial(fun, lp), x, batch_size=5)


def data_parallel(fun, check_vma):
    """The loss over eight devices, each with a part of the data and all of the weights."""

    def total(lp, x):
        return lax.psum(loss(fun)(lp, x), "data")

    return jax.shard_map(total, mesh=MESH, in_specs=(ALL, ROWS), out_specs=ALL, check_vma=check_vma)


# Over `lift`: from a function of (lora_params, x) to another, which is then jitted.
OVER = {
    "value_and_grad": lambda f: jax.value_and_grad(loss(f)),
    "grad_of_inputs": lambda f: jax.grad(loss(f), argnums=1),
    "grad_of_grad": lambda f: jax.grad(lambda lp, x: jnp.sum(jax.grad(loss(f))(lp, x)["up"].factors["A"] ** 2)),
    "hessian": lambda f: lambda lp, x: jax.hessian(lambda up: loss(f)(lp | {"up": up}, x[0]))(lp["up"]),
    "hessian_vector": lambda f: lambda lp, x: jax.jvp(jax.grad(loss(f)), (lp, x), (INITIAL, x))[1],
    "jvp": lambda f: lambda lp, x: jax.jvp(f, (lp, x), (INITIAL, x)),
    "vjp": lambda f: lambda lp, x: jax.vjp(f, lp, x)[1](x),
    "linearize": lambda f: lambda lp, x: jax.linearize(f, lp, x)[1](INITIAL, x),
    "jacfwd": lambda f: lambda lp, x: jax.jacfwd(f)(lp, x[0]),
    "jacrev": lambda f: lambda lp, x: jax.jacrev(f)(lp, x[0]),
    "vmap_of_data": lambda f: jax.vmap(f, (None, 0)),
    "vmap_of_adapters": lambda f: lambda lp, x: jax.vmap(f, (0, None))(stacked(lp), x),
    "vmap_of_both": lambda f: lambda lp, x: jax.vmap(f)(stacked(lp, 16), x),
    "vmap_of_grad": lambda f: jax.vmap(jax.grad(loss(f)), (None, 0)),
    "vmap_of_grad_of_adapters": lambda f: lambda lp, x: jax.vmap(jax.grad(loss(f)), (0, None))(stacked(lp), x),
    "scan": lambda f: jax.grad(loss(repeated(f))),
    "scan_of_adapters": lambda f: lambda lp, x: lax.scan(lambda x, lp: (f(lp, x), None), x, stacked(lp))[0],
    "checkpoint": lambda f: jax.grad(loss(jax.checkpoint(f))),
    "cond": lambda f: lambda lp, x: lax.cond(x[0, 0] > 0, f, lambda lp, x: 2 * f(lp, x), lp, x),
    "while": looped,
    "map": mapped,
    "associative_scan": associative,
    "shard_map": lambda f: jax.grad(data_parallel(f, check_vma=True)),
    "shard_map_unchecked": lambda f: jax.grad(data_parallel(f, check_vma=False)),
    "checkify": lambda f: lambda lp, x: checkify.checkify(f, checkify.all_checks)(lp, x)[1],
    "lift": lambda f: lora.lift(lora.lift(f)),
}


def explicitly_sharded(f):
    """Under a mesh whose axes are part of types."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X.reshape(8, 2, 8), NamedSharding(mesh, ROWS))
        return jax.jit(jax.value_and_grad(loss(f)))(jax.device_put(LORA_PARAMS, NamedSharding(mesh, ALL)), x)


SHARDINGS = {"in_shardings": NamedSharding(MESH, ALL), "out_shardings": NamedSharding(MESH, ROWS)}
# What is not under `jax.jit` as a whole: from a function of (lora_params, x) to something to compare.
CALLED = {
    "eagerly": lambda f: jax.value_and_grad(loss(f))(LORA_PARAMS, X),
    "ahead_of_time": lambda f: jax.jit(f).lower(LORA_PARAMS, X).compile()(LORA_PARAMS, X),
    "sharded": lambda f: jax.jit(jax.grad(loss(f)))(LORA_PARAMS, jax.device_put(X, NamedSharding(MESH, ROWS))),
    "sharded_explicitly": explicitly_sharded,
    "in_and_out_sharded": lambda f: jax.jit(f, **SHARDINGS)(LORA_PARAMS, X),
    "pmap": lambda f: jax.pmap(f, in_axes=(None, 0))(LORA_PARAMS, X.reshape(8, 2, 8)),
}


@pytest.mark.parametrize("name", OVER)
def test_over_lift(name):
    run = jax.jit if "shard" in name else in_numpy
    found, expected = jax.jit(OVER[name](lifted))(LORA_PARAMS, X), run(OVER[name](merged))(LORA_PARAMS, X)
    assert jax.tree.leaves(expected)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", CALLED)
def test_called(name):
    found, expected = (CALLED[name](f) for f in (lifted, merged))
    assert error(found, expected) < 1e-5


def shard_mapped(product, weight, data, out, check_vma):
    """The model with its first product made on eight devices, of parts of `up` and of x."""

    def fun(params, x):
        specs = {"in_specs": (weight, data), "out_specs": out, "check_vma": check_vma}
        return jnp.tanh(jax.shard_map(product, mesh=MESH, **specs)(params["up"], x)) @ params["down"]

    return fun


SHARDED = {
    "replicated": (lambda w, x: x @ w, ALL, ROWS, ROWS),
    "in": (lambda w, x: lax.psum(x @ w, "data"), ROWS, COLUMNS, ALL),
    "in_scattered": (lambda w, x: lax.psum_scatter(x @ w, "data", tiled=True), ROWS, COLUMNS, ROWS),
    "out": (lambda w, x: x @ w, COLUMNS, ALL, COLUMNS),
    "out_gathered": (lambda w, x: x @ lax.all_gather(w, "data", axis=1, tiled=True), COLUMNS, ROWS, ROWS),
    "fsdp": (lambda w, x: x @ lax.all_gather(w, "data", axis=0, tiled=True), ROWS, ROWS, ROWS),
}


def with_constant(params, x):
    with jax.ensure_compile_time_eval():
        positive = bool(jnp.arange(3).sum() > 0)
    return model(params, x) if positive else x


def called_back(params, x):
    y = model(params, x)
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return y + jax.pure_callback(np.sin, shape, lax.stop_gradient(y), vmap_method="expand_dims")


def many(params, x, n, *, scale):
    for _ in range(n):
        x = scale * model(params, x)
    return x


OF_X = {"in_shardings": (None, NamedSharding(MESH, ROWS)), "out_shardings": NamedSharding(MESH, COLUMNS)}
# Under `lift`: functions of (params, x).
UNDER = {
    "grad_of_inputs": lambda p, x: jax.grad(loss(model), argnums=1)(p, x),
    "grad_of_weights": lambda p, x: jax.grad(loss(model))(p, x),
    "jvp": lambda p, x: jax.jvp(functools.partial(model, p), (x,), (jnp.cos(x),)),
    "linearize": lambda p, x: jax.linearize(functools.partial(model, p), x)[1](jnp.cos(x)),
    "linear_transpose": lambda p, x: jax.linear_transpose(lambda x: x @ p["up"] @ p["down"], x)(jnp.cos(x)),
    "jacobian": lambda p, x: jax.jacrev(functools.partial(model, p))(x[0]),
    "vmap": lambda p, x: jax.vmap(model, (None, 1))(p, x[:, None]),
    "scan": repeated(model),
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda _, x: model(p, x), x),
    "map": mapped(model),
    "associative_scan": associative(model),
    "checkpoint_names": jax.checkpoint(model, policy=jax.checkpoint_policies.save_only_these_names("hidden")),
    "named_call": jax.named_call(model, name="a_name"),
    "named_scope": jax.named_scope("a_name")(model),
    "compile_time_eval": with_constant,
    "einsum": lambda p, x: jnp.einsum("bi,io,oj->bj", x[:2], p["up"], p["down"], optimize="optimal"),
    "pure_callback": called_back,
    "jit_static": lambda p, x: jax.jit(many, static_argnums=2, static_argnames="scale")(p, x, 2, scale=0.5),
    "jit_keywords": lambda p, x: jax.jit(model)(x=x, params=p),
    "jit_donated": lambda p, x: jax.jit(model, donate_argnums=1)(p, jnp.cos(x)),
    "jit_inline": jax.jit(model, inline=True),
    "jit_shardings": jax.jit(model, **OF_X),
    "lift": lora.lift(model),
    "lift_of_lift": lora.lift(lora.lift(model)),
    **{
        f"shard_map_{name}_{'checked' if check else 'unchecked'}": shard_mapped(*parts, check_vma=check)
        for name, parts in SHARDED.items()
        for check in (True, False)
    },
}


@pytest.mark.parametrize("name", UNDER)
def test_under_lift(name):
    def step(run):
        def total(lora_params, x):
            y = run(lora_params, x, UNDER[name])
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(y)), y

        return jax.grad(total, argnums=(0, 1), has_aux=True)

    run = jax.jit if "shard" in name else in_numpy
    assert error(jax.jit(step(lifted))(LORA_PARAMS, X), run(step(merged))(LORA_PARAMS, X)) < 1e-5


def test_a_checkpoint_saves_what_its_policy_says():
    def products(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        fun = jax.checkpoint(model, policy=policy)
        jaxpr = jax.make_jaxpr(jax.grad(lambda lp: loss(lifted)(lp, X, fun)))(LORA_PARAMS)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr))

    assert products("hidden") < products()


@pytest.mark.parametrize("name", ["scan", "fori", "cond", "jit"])
def test_without_jit(name):
    programs = UNDER | {"cond": lambda p, x: lax.cond(x[0, 0] < 9, model, lambda p, x: x, p, x), "jit": jax.jit(model)}
    with jax.disable_jit():
        found, expected = (jax.grad(loss(f))(LORA_PARAMS, X, programs[name]) for f in (lifted, merged))
    assert error(found, expected) < 1e-5


def test_a_function_that_lifts_another_tree():
    """Of two adapted trees, one is an argument; the other is attached and lifted within, there beside the first."""
    negative = jax.tree.map(lambda x: -x, LORA_PARAMS)
    inner, plain = lora.attach(FROZEN, negative), lora.merge(FROZEN, negative)
    found = lora.lift(lambda p, x: lora.lift(lambda q, x: model(q, model(p, x)) + model(p, x))(inner, x))(ATTACHED, X)
    assert error(found, model(plain, model(MERGED, X)) + model(MERGED, X)) < 1e-5


def test_an_attached_tree_can_be_differentiated():
    grads = jax.grad(loss(lora.lift(model)))(ATTACHED, X)
    expected = jax.grad(loss(lifted))(LORA_PARAMS, X)
    for path, adapter in expected.items():
        assert error(list(grads[path].deltas[0].operands), [adapter.factors["A"], adapter.factors["B"]]) < 1e-5


# Effects: functions of (params, x, tell), where `tell` takes an activation to the log.
EFFECTS = {
    "bare": lambda p, x, tell: tell(model(p, x)),
    "jit": lambda p, x, tell: jax.jit(lambda x: tell(model(p, x)))(x),
    "scan": lambda p, x, tell: lax.scan(lambda x, _: (tell(model(p, x)), None), x, length=3)[0],
    "while": lambda p, x, tell: looped(lambda p, x: tell(model(p, x)))(p, x),
    "cond": lambda p, x, tell: lax.cond(x[0, 0] < 99, lambda x: tell(model(p, x)), lambda x: x, x),
    "of_no_weight": lambda p, x, tell: model(p, tell(x)),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "ordered_io") for name in EFFECTS]
    + [(name, kind) for name in ("bare", "scan") for kind in ("print", "callback")],
)
def test_effects_are_kept(name, kind, capfd):
    """Each happens as often as it should, in its order, and not while the function is traced."""

    def run(fun, params):
        log = []

        def tell(x):
            first = x[0, 0] * 100
            if kind == "print":
                jax.debug.print("{}", first.astype(jnp.int32), ordered=True)
            elif kind == "callback":
                jax.debug.callback(lambda value: log.append(int(value)), first)
            else:
                io_callback(lambda value: log.append(int(value)), None, first, ordered=True)
            return x

        y = jax.jit(lambda params, x: fun(lambda p, x: EFFECTS[name](p, x, tell))(params, x))(params, X)
        jax.effects_barrier()
        return y, log + capfd.readouterr().out.split()

    (y, log), (expected_y, expected) = run(lora.lift, ATTACHED), run(lambda fun: fun, MERGED)
    assert error(y, expected_y) < 1e-5
    assert sorted(log) == sorted(expected) if kind == "callback" else log == expected
    assert len(log) > (1 if name in ("scan", "while") else 0)


def test_export():
    """Of plain arrays, with a batch of any size, and of the adapters themselves."""
    leaves, treedef = jax.tree.flatten(LORA_PARAMS)

    def total(leaves, x):
        y = lifted(jax.tree.unflatten(treedef, leaves), x)
        return y.sum(), y

    step = jax.jit(jax.grad(total, has_aux=True))
    b, t = jax.export.symbolic_shape("b, t")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves)
    for size in ((1, 16), (b, t)):
        exported = jax.export.export(step)(shapes, jax.ShapeDtypeStruct((*size, 8), jnp.float32))
        assert error(exported.call(leaves, X[None]), step(leaves, X[None])) < 1e-5
    assert error(exported.call(leaves, X.reshape(8, 2, 8)), step(leaves, X.reshape(8, 2, 8))) < 1e-5


def test_export_to_bytes():
    """Of plain arrays, or of adapters as they are."""
    leaves, treedef = jax.tree.flatten(LORA_PARAMS)
    flat = jax.export.export(jax.jit(lambda leaves, x: lifted(jax.tree.unflatten(treedef, leaves), x)))(leaves, X)
    assert error(jax.export.deserialize(flat.serialize()).call(leaves, X), model(MERGED, X)) < 1e-5
    blob = jax.export.export(jax.jit(lifted))(LORA_PARAMS, X).serialize(vjp_order=1)
    assert error(jax.export.deserialize(blob).call(LORA_PARAMS, X), model(MERGED, X)) < 1e-5
    grads = jax.grad(loss(jax.export.deserialize(blob).call))(LORA_PARAMS, X)
    assert error(grads, jax.grad(loss(merged))(LORA_PARAMS, X)) < 1e-5


def llama(params, tokens):
    """A decoder of layers in a scan, grouped queries and gated units, without position embeddings."""

    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, -1, keepdims=True)).astype(x.dtype) * scale

    def layer(x, p):
        y = norm(x, p["norm1"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in "qkv")
        x = x + jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), p["o"])
        y = norm(x, p["norm2"])
        return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], None

    x, _ = lax.scan(jax.checkpoint(layer), params["embed"][tokens], params["layers"])
    return norm(x, params["norm"]) @ params["head"]


@pytest.mark.standard_promotion
def test_a_large_model_is_planned_without_memory():
    """Llama 3 70B: sites, factors, and the gradients of a step, of shapes alone."""
    n, d, f, heads, groups, hd, vocab, rank = 80, 8192, 28672, 64, 8, 128, 128256, 16
    layers = {"q": (d, heads, hd), "k": (d, groups, hd), "v": (d, groups, hd), "o": (heads, hd, d)}
    layers |= {"gate": (d, f), "up": (d, f), "down": (f, d), "norm1": (d,), "norm2": (d,)}
    shapes = {"embed": (vocab, d), "head": (d, vocab), "norm": (d,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    params["layers"] = {name: jax.ShapeDtypeStruct((n, *shape), jnp.bfloat16) for name, shape in layers.items()}
    tokens, key = jax.ShapeDtypeStruct((1, 4096), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    sites = lora.sites(llama, params, tokens)
    rules = all_adaptable(lora.LoRA(rank))
    frozen, lora_params = jax.eval_shape(lambda key, p: lora.split(key, p, rules, sites=sites), key, params)
    both = sum(d + out for out in (heads * hd, groups * hd, groups * hd, heads * hd, f, f, f))
    summary = lora.summary(frozen, lora_params)
    assert summary.trained == rank * (n * both + 2 * (vocab + d))
    assert summary.total == 70_553_706_496

    def step(lora_params, frozen, tokens):
        return lora.lift(llama)(lora.attach(frozen, lora_params), tokens).astype(jnp.float32).mean()

    grads = jax.eval_shape(jax.grad(step), lora_params, frozen, tokens)
    assert jax.tree.structure(grads) == jax.tree.structure(lora_params)
    assert [x.shape for x in jax.tree.leaves(grads)] == [x.shape for x in jax.tree.leaves(lora_params)]


def test_factors_and_their_state_are_donated_and_the_base_is_not():
    tx = lora.optimizer(optax.sgd(0.1, momentum=0.9))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora_params, state, frozen, x):
        grads = jax.grad(lambda lp: loss(lora.lift(model))(lora.attach(frozen, lp), x))(lora_params)
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state

    start = jax.tree.map(jnp.copy, LORA_PARAMS)
    state = tx.init(start)
    trained, state = step(start, state, FROZEN, X)
    assert all(x.is_deleted() for x in jax.tree.leaves(start))
    assert not any(x.is_deleted() for x in jax.tree.leaves(FROZEN))
    expected = jax.tree.map(lambda x, g: x - 0.1 * g, LORA_PARAMS, jax.grad(loss(merged))(LORA_PARAMS, X))
    assert error(trained, expected) < 1e-5
    step(trained, state, FROZEN, X)


def test_nan_is_seen_where_there_is_one():
    step = jax.jit(jax.value_and_grad(loss(lifted)))
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), LORA_PARAMS)
    with jax.debug_nans(True):
        assert jnp.isfinite(step(LORA_PARAMS, X)[0])
        assert jnp.isfinite(step(INITIAL, X)[0])
        with pytest.raises(FloatingPointError, match="nan"):
            step(broken, X)


def test_keys_are_arguments_leaves_and_mapped_over():
    def dropout(params, x, key):
        return model(params, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0.0))

    keys = jax.random.split(KEY, 3)
    found, expected = (
        jax.jit(jax.vmap(fun, (None, None, 0)))(params, X, keys)
        for fun, params in ((lora.lift(dropout), ATTACHED), (dropout, MERGED))
    )
    assert error(found, expected) < 1e-5
    assert error(found[0], found[1]) > 0.1
    within = lora.lift(lambda params, x: dropout(params, x, params["key"]))
    frozen, lora_params = lora.split(KEY, PARAMS | {"key": keys[0]}, {"up|down": lora.LoRA(rank=2, alpha=4)})
    assert error(jax.jit(within)(lora.attach(frozen, LORA_PARAMS), X), expected[0]) < 1e-5
    assert set(lora_params) == set(PARAMS)


def test_wide_accumulators_of_narrow_products():
    """Of small whole numbers bfloat16 makes no errors, so lifted and merged are the same bits."""

    def whole(shape, seed):
        return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.bfloat16)

    frozen, lora_params = lora.split(KEY, {"w": whole((8, 6), 1)}, {"w": lora.LoRA(rank=2, alpha=4, dtype="bfloat16")})
    lora_params["w"].factors.update(A=whole((8, 2), 2), B=whole((2, 6), 3))

    def product(params, x):
        return jnp.dot(x, params["w"], preferred_element_type=jnp.float32)

    found, expected = lora.lift(product), product(lora.merge(frozen, lora_params), whole((4, 8), 4))
    found = found(lora.attach(frozen, lora_params), whole((4, 8), 4))
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_python_branches_on_what_no_weight_enters():
    """On arguments that NumPy holds, or flags; on what is computed from weights JAX says what it says under jit."""

    @lora.lift
    def fun(params, x, flag):
        if x.sum() > 99 or not flag:
            return x
        return model(params, x)

    @lora.lift
    def of_weights(params, x):
        return x if model(params, x).sum() > 0 else -x

    x = np.asarray(X)
    frozen = jax.tree.map(np.asarray, FROZEN)
    assert error(fun(lora.attach(frozen, LORA_PARAMS), x, jnp.array(True)), model(MERGED, X)) < 1e-5
    with pytest.raises(jax.errors.ConcretizationTypeError):
        of_weights(ATTACHED, x)

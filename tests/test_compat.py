"""What the rules rely on in JAX's equations. If a release changes it, this says so before a rule is wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import compat
from lora_jax.interpreter import RULES

W, X = jnp.ones((4, 6)), jnp.ones((3, 4))
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def inside(body, out="data", check_vma=True):
    part = jax.shard_map(body, mesh=MESH, in_specs=P("data"), out_specs=P(out), check_vma=check_vma)
    return lambda _: part(jnp.ones((8, 8)))


def squared(x):
    return x * x


@jax.custom_jvp
def custom(x):
    return x


custom.defjvp(lambda primals, tangents: (custom(*primals), *tangents))

# A program, one argument, and the primitive that it must bind with the names of all its parameters.
EQUATIONS = {
    "dot_general": (lambda w: X @ w, "dimension_numbers out_sharding precision preferred_element_type"),
    "mul": (lambda w: w * w, "out_dtype"),
    "add": (lambda w: w + w, ""),
    "sub": (lambda w: w - 2 * w, ""),
    "div": (lambda w: w / 2, ""),
    "neg": (lambda w: -w, ""),
    "square": (lambda w: jnp.square(w), ""),
    "integer_pow": (lambda w: lax.integer_pow(w, 2), "y"),
    "reduce_sum": (lambda w: w.sum(0), "axes out_sharding"),
    "transpose": (lambda w: w.T, "permutation"),
    "reshape": (lambda w: w.reshape(8, 3), "dimensions new_sizes sharding"),
    "squeeze": (lambda w: lax.squeeze(w[:1], [0]), "dimensions"),
    "broadcast_in_dim": (lambda w: jnp.broadcast_to(w, (2, 4, 6)), "broadcast_dimensions shape sharding"),
    "tile": (lambda w: jnp.tile(w, (2, 1)), "reps"),
    "convert_element_type": (lambda w: w.astype(jnp.bfloat16), "new_dtype sharding weak_type"),
    "slice": (lambda w: w[1:3], "limit_indices start_indices strides"),
    "split": (lambda w: jnp.split(w, 2), "axis sizes"),
    "unstack": (lambda w: jnp.unstack(w), "axis"),
    "stack": (lambda w: jnp.stack([w, w]), "axis"),
    "concatenate": (lambda w: jnp.concatenate([w, w]), "dimension"),
    "pad": (lambda w: jnp.pad(w, 1), "padding_config"),
    "rev": (lambda w: w[::-1], "dimensions"),
    "select_n": (lambda w: jnp.where(w > 0, w, 2 * w), ""),
    "dynamic_slice": (lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(1), 2), "slice_sizes"),
    "gather": (
        lambda w: w[jnp.array([1, 2])],
        "dimension_numbers fill_value indices_are_sorted mode slice_sizes unique_indices",
    ),
    "conv_general_dilated": (
        lambda w: lax.conv(jnp.ones((1, 4, 5)), w[:, :4, None], (1,), "SAME"),
        "batch_group_count dimension_numbers feature_group_count lhs_dilation out_sharding padding precision "
        "preferred_element_type rhs_dilation window_strides",
    ),
    "ragged_dot_general": (
        lambda w: lax.ragged_dot(X, w[None], jnp.array([3], jnp.int32)),
        "group_offset out_sharding precision preferred_element_type ragged_dot_dimension_numbers",
    ),
    "optimization_barrier": (lambda w: lax.optimization_barrier(w), ""),
    "copy": (lambda w: jnp.copy(w), ""),
    "stop_gradient": (lambda w: jax.vmap(lax.stop_gradient)(w), ""),
    "scan": (
        lambda w: lax.scan(lambda c, w: (c + w.sum(), None), 0.0, w)[0],
        # JAX 0.10; 0.12 has `ft_in` and `ft_out` for the counts
        "_split_transpose jaxpr length num_carry num_consts reverse unroll",
    ),
    "while": (
        lambda w: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + w.sum(), w),
        "body_jaxpr body_nconsts cond_jaxpr cond_nconsts",
    ),
    "cond": (lambda w: lax.cond(w[0, 0] > 0, lambda: w, lambda: 2 * w), "branches"),
    "remat": (lambda w: jax.checkpoint(squared)(w), "jaxpr policy prevent_cse"),
    "jit": (
        lambda w: jax.jit(squared)(w),
        "compiler_options_kvs donated_invars in_layouts in_shardings jaxpr name out_layouts out_shardings",
    ),
    "custom_jvp_call": (lambda w: custom(w), "call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros"),
    "reshard": (
        lambda w: jax.sharding.reshard(w, NamedSharding(jax.make_mesh((1,), ("x",)), P())),
        "concrete_mesh dst_sharding",
    ),
    "shard_map": (
        inside(lambda x: x),
        "check_vma in_specs jaxpr mesh newly_manual_axes out_specs",
    ),
    "pvary": (inside(lambda x: lax.pcast(jnp.ones(3), "data", to="varying")), "axes"),
    "psum_invariant": (inside(lambda x: lax.psum(x, "data"), None), "axes"),
    "psum": (inside(lambda x: lax.psum(x, "data"), None, check_vma=False), "axes axis_index_groups"),
    "all_gather": (
        inside(lambda x: lax.all_gather(x, "data")),
        "all_gather_dimension axis_index_groups axis_name axis_size tiled",
    ),
    "reduce_scatter": (
        inside(lambda x: lax.psum_scatter(x.T @ x, "data", tiled=True)),
        "axis_index_groups axis_name axis_size scatter_dimension tiled",
    ),
    "ppermute": (inside(lambda x: lax.ppermute(x, "data", [(0, 1)])), "axis_name perm"),
    "sharding_constraint": (
        lambda w: lax.with_sharding_constraint(w, NamedSharding(MESH, P())),
        "sharding unconstrained_dims",
    ),
}
# Parameters that say nothing of the mathematics, and come and go with releases.
ASIDE = {"_split_transpose", "inline", "keep_unused", "ctx_mesh", "layout", "context_mesh", "differentiated"}


def find(jaxpr, name):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            return eqn
        for value in eqn.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(inner, "eqns") and (found := find(compat.parts(inner)[0], name)):
                    return found
    return None


@pytest.mark.parametrize("name", EQUATIONS)
def test_an_equation_is_as_its_rule_expects(name):
    program, known = EQUATIONS[name]
    names = {"remat": ("remat", "remat2"), "jit": ("jit", "pjit"), "copy": ("copy", "copy_p")}.get(name, (name,))
    jaxpr = compat.parts(jax.make_jaxpr(program)(W))[0]
    eqn = next(filter(None, (find(jaxpr, n) for n in names)), None)
    assert eqn is not None, (
        f"JAX {jax.__version__} no longer binds {name!r} for this program: {jaxpr}. Find what it binds instead, give "
        "that a rule in lora_jax/rules, and change this table"
    )
    assert eqn.primitive.name in RULES, f"there is no rule for {eqn.primitive.name!r}"
    found = set(eqn.params) - ASIDE
    if "ft_in" in found:
        found = found - {"ft_in", "ft_out"} | {"num_consts", "num_carry"}
    new, gone = found - set(known.split()), set(known.split()) - ASIDE - found
    assert not (new or gone), (
        f"in JAX {jax.__version__} the equation {name!r} has new parameters {sorted(new)} and lacks {sorted(gone)}: "
        f"read its rule in lora_jax/rules with that in mind, then change this table"
    )


def test_every_rule_is_for_an_equation_known_here_or_an_alias():
    aliases = {"pjit", "remat2", "checkpoint", "copy_p", "name", "add_any", "all_gather_invariant"}
    inlined = {"closed_call", "core_call", "eval_jaxpr"}
    assert RULES.keys() - aliases - inlined == EQUATIONS.keys()


def test_scan_counts():
    jaxpr = jax.make_jaxpr(lambda w, c, d: lax.scan(lambda a, x: (a * c + d, x), 1.0, w))(jnp.ones(3), 2.0, 3.0)
    assert compat.scan_counts(find(compat.parts(jaxpr)[0], "scan").params) == (2, 1)


def test_forwarded():
    def body(a, b):
        return jax.jit(lambda x: lax.optimization_barrier((x, 2 * x))[0])(b), a + 1, a

    assert compat.forwarded(jax.make_jaxpr(body)(1.0, 2.0)) == [1, None, 0]


def test_a_part_of_the_results():
    closed = jax.make_jaxpr(lambda a, b: (jnp.sin(a), a * b, b))(1.0, 2.0)
    part = compat.with_results(closed, [False, True, False])
    assert [eqn.primitive.name for eqn in compat.parts(part)[0].eqns] == ["mul"]
    assert len(compat.parts(part)[0].invars) == 2

"""What `sites` sees of a program, by tracing alone."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from zoo import ZOO

import lora_jax as lora


def found(fun, params, *args, **kwargs):
    sites = lora.sites(fun, params, *args, **kwargs)
    return {path: (s.kind, s.batch_axes, s.in_axes, s.out_axes) for path, s in sites.items()}


def test_the_orientations_of_a_matrix():
    params = {"io": jnp.ones((3, 4)), "oi": jnp.ones((4, 3)), "left": jnp.ones((4, 2))}
    assert found(lambda p, x: p["left"] @ (x @ p["io"] + x @ p["oi"].T).T[:2], params, jnp.ones((2, 3))) == {
        "io": ("linear", (), (0,), (1,)),
        "left": ("linear", (), (1,), (0,)),
        "oi": ("linear", (), (1,), (0,)),
    }


def test_a_tied_embedding_has_both_uses():
    loss, params, batch = ZOO["linen"]()
    site = lora.sites(loss, params, *batch)["params/embed/embedding"]
    assert (site.kind, site.in_axes, site.out_axes) == ("embedding", (0,), (1,))
    assert [(use.kind, use.in_axes, use.out_axes) for use in site.uses] == [
        ("embedding", (0,), (1,)),
        ("linear", (1,), (0,)),
    ]
    assert [use.primitive for use in site.uses] == ["gather", "dot_general"]


def test_stacked_layers_and_heads():
    loss, params, batch = ZOO["linen"]()
    sites = found(loss, params, *batch)
    assert sites["params/layers/query/kernel"] == ("linear", (0,), (1,), (2, 3))
    assert sites["params/layers/out/kernel"] == ("linear", (0,), (1, 2), (3,))
    assert sites["params/layers/up/bias"] == ("other", (), (), ())


def test_uses_are_counted_and_located():
    def twice(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    (site,) = lora.sites(twice, {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))).values()
    assert len(site.uses) == 2
    assert site.uses[0].where.startswith("test_sites.py:")
    assert site.uses[0].where.endswith("twice)")


def test_a_convolution():
    model = nn.Conv(5, (3, 3), strides=2)
    x = jnp.ones((1, 8, 8, 4))
    params = model.init(jax.random.key(0), x)
    assert found(model.apply, params, x)["params/kernel"] == ("conv", (), (0, 1, 2), (3,))


def test_experts():
    params = {"up": jnp.ones((4, 6, 5)), "router": jnp.ones((6, 4))}

    def mixture(params, x):
        gates = jax.nn.softmax(x @ params["router"])
        return jnp.einsum("ne,nef->nf", gates, jnp.einsum("nd,edf->nef", x, params["up"]))

    sites = found(mixture, params, jnp.ones((3, 6)))
    assert sites["router"] == ("linear", (), (0,), (1,))
    assert sites["up"][0] == "linear"
    assert found(lambda p, x: jnp.einsum("end,edf->enf", x, p["up"]), params, jnp.ones((4, 3, 6)))["up"] == (
        "linear",
        (0,),
        (1,),
        (2,),
    )


def test_what_is_not_read_and_what_is_used_whole():
    params = {"unused": jnp.ones((3, 3)), "bias": jnp.ones(3), "count": jnp.zeros((), jnp.int32), "name": "a name"}
    sites = found(lambda p, x: x + p["bias"] * p["count"].astype(jnp.float32), params, jnp.ones(3))
    assert sites == {
        "bias": ("other", (), (), ()),
        "count": ("other", (), (), ()),
        "unused": ("unused", (), (), ()),
    }


def test_a_vector_between_is_no_weight():
    """A scale that multiplies an activation or a kernel, one token at a time, hides neither kernel nor embedding."""
    params = {"scale": jnp.ones(7), "w": jnp.ones((7, 7)), "table": jnp.ones((5, 7))}

    def recurrent(params, tokens):
        def cell(h, token):
            return jnp.tanh((params["scale"] * params["table"][token]) @ (params["w"] * params["scale"]) + h), None

        return jax.lax.scan(cell, jnp.zeros(7), tokens)[0]

    assert found(recurrent, params, jnp.arange(4)) == {
        "scale": ("other", (), (), ()),
        "table": ("embedding", (), (0,), (1,)),
        "w": ("linear", (), (0,), (1,)),
    }


def test_leaves_that_are_keys_or_handed_back():
    params = {"key": jax.random.key(0), "w": jnp.ones((3, 3))}
    assert found(lambda p: p["w"].T, params) == {"key": ("other", (), (), ()), "w": ("other", (), (), ())}


def test_a_grouped_convolution():
    model = nn.Conv(4, (3,), feature_group_count=2)
    params = model.init(jax.random.key(0), jnp.ones((1, 8, 4)))
    assert found(model.apply, params, jnp.ones((1, 8, 4)))["params/kernel"] == ("conv", (), (0, 1), (2,))


def test_nothing_is_computed():
    params = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.bfloat16)
    assert found(lambda p, x, flag: x @ p["w"] if flag else x, params, x, flag=True) == {
        "w": ("linear", (), (0,), (1,))
    }


@pytest.mark.standard_promotion
@pytest.mark.parametrize("model", ZOO)
def test_every_matrix_of_the_zoo_is_found(model):
    loss, params, batch = ZOO[model]()
    sites = lora.sites(loss, params, *batch)
    assert {p for p, s in sites.items() if len(s.shape) >= 2 and not s.adaptable and "bias" not in p} <= {
        p for p in sites if "norm" in p
    }

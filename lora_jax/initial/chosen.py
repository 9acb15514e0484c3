"""Rules made of rules: what they say of each leaf of a tree, with other ranks and other ways to begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from lora_jax import tree
from lora_jax.choice import Rules, choose
from lora_jax.sites import Site
from lora_jax.variants.base import Placed, Variant
from lora_jax.variants.lora import LoRA

T = TypeVar("T")


def chosen(rules: Rules, params: Any, sites: Mapping[str, Site] | None) -> dict[str, tuple[Variant, Site]]:
    """The variant and the site of each leaf of a tree that rules adapt, by path; errors are those of `split`."""
    leaves, _ = tree.flatten(params)
    return choose(rules, {path: leaf for path, leaf in leaves.items() if tree.is_array(leaf)}, sites)


def begun_from(name: str, adapted: Mapping[str, tuple[Variant, Site]], params: Any) -> dict[str, tuple[LoRA, Site]]:
    """Those of the adapted leaves that are `LoRA`'s, whose arrays an initialization can look at.

    Raises:
      ValueError: There is none, or the tree has no array there.
    """
    leaves, _ = tree.flatten(params)
    found = {path: (v, site) for path, (v, site) in adapted.items() if isinstance(v, LoRA)}
    if not found:
        raise ValueError(f"{name}: the rules give LoRA to no leaf, and its factors are what it begins")
    for path in found:
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise ValueError(f"{name}: {path!r} has no values to begin from: give the weights themselves")
    return found


def only_linear(name: str, adapted: Mapping[str, tuple[LoRA, Site]]) -> None:
    """Refuses leaves whose inputs are not captured.

    Raises:
      ValueError: A leaf is an embedding or a convolution.
    """
    for path, (_, site) in adapted.items():
        if site.kind != "linear":
            raise ValueError(
                f"{name}: {path!r} {site.shape} is {site.kind}, and {name} begins from the inputs of linear leaves: "
                "leave it out of these rules, and give `split` a function that asks them first and then others"
            )


def as_rules(adapted: Mapping[str, tuple[Variant | None, Site]]) -> Callable[[str, Site], Placed | Variant | None]:
    """A rule that says for each path the variant that it has here, with the axes it has here."""
    placed = {
        path: variant and Placed(variant, site.batch_axes, site.in_axes, site.out_axes) if site.adaptable else variant
        for path, (variant, site) in adapted.items()
    }
    return lambda path, site: placed.get(path)


def mapped(rules: Rules, change: Callable[[LoRA], LoRA]) -> Rules:
    """The same rules with each `LoRA` that they give changed."""

    def of(answer: Any) -> Any:
        if isinstance(answer, Placed):
            return dataclasses.replace(answer, variant=of(answer.variant))
        return change(answer) if isinstance(answer, LoRA) else answer

    if callable(rules):
        return lambda path, site: of(rules(path, site))
    return {pattern: of(answer) for pattern, answer in rules.items()}


def total_over(fun: Callable[[Any, Any], T], params: Any, batches: Iterable[Any]) -> tuple[T, int]:
    """The sum of what `fun(params, batch)` returns, jitted, over batches, and how many there were.

    Raises:
      ValueError: There is no batch.
    """

    def call(arrays: list[Any], static: tuple[Any, ...], treedef: Any) -> T:
        filled, rest = iter(arrays), iter(static)
        return fun(*jax.tree.unflatten(treedef, [next(filled) if x else next(rest) for x in static[-1]]))

    jitted = jax.jit(call, static_argnums=(1, 2))
    total, n = None, 0
    for batch in batches:
        leaves, treedef = jax.tree.flatten((params, batch))
        array = tuple(map(tree.is_array, leaves))
        static = (*(leaf for leaf, yes in zip(leaves, array, strict=True) if not yes), array)
        sums = jitted([leaf for leaf, yes in zip(leaves, array, strict=True) if yes], static, treedef)
        total, n = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums), n + 1
    if total is None:
        raise ValueError("there are no batches: give at least one (an iterator gives its batches once)")
    return total, n

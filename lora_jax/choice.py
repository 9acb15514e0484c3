"""Which leaf gets which variant: rules, matched against paths and sites."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax import tree
from lora_jax.sites import Site
from lora_jax.variants.base import Placed, Variant

Rules = Mapping[str, Any] | Callable[[str, Site], Any]


def choose(
    rules: Rules, arrays: Mapping[str, Any], sites: Mapping[str, Site] | None
) -> dict[str, tuple[Variant, Site]]:
    """The variant and the site of each leaf that the rules adapt, by path.

    Args:
      rules: As `lora_jax.split` takes them.
      arrays: All leaves that are arrays, by path; abstract ones will do.
      sites: What `lora_jax.sites` found, or None.

    Raises:
      ValueError: As `lora_jax.split`, for all that needs no values to be known.
    """
    return {path: _placed(path, chosen, arrays[path], sites) for path, chosen in _answers(rules, arrays, sites).items()}


def _answers(rules: Rules, arrays: Mapping[str, Any], sites: Mapping[str, Site] | None) -> dict[str, Variant | Placed]:
    """What the rules say of each adapted path."""
    if callable(rules):
        known = {path: (sites or {}).get(path, _by_shape(leaf)) for path, leaf in arrays.items()}
        answers = {path: rules(path, known[path]) for path in arrays}
    elif not isinstance(rules, Mapping):
        raise ValueError(f"rules are a mapping from pattern to variant, or a callable (path, site), not {rules!r}")
    else:
        answers = {path: rules[pattern] for path, pattern in first_matches(rules, arrays).items()}
    for path, answer in answers.items():
        if not isinstance(answer, Variant | Placed | None):
            raise ValueError(
                f"the rule for {path!r} gives {answer!r}, which is no variant: give one, such as LoRA(rank=8)"
            )
    return {path: answer for path, answer in answers.items() if answer is not None}


def first_matches(rules: Mapping[str, Any], paths: Iterable[str]) -> dict[str, str]:
    """The first pattern that matches each path whole; each pattern must be the first for some path."""
    first: dict[str, str] = {}
    for pattern in rules:
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"the rule {pattern!r} is no regular expression: {error}") from error
        matched = [path for path in paths if compiled.fullmatch(path)]
        if not matched:
            inside = [path for path in paths if compiled.search(path)]
            hint = f"; it matches a part of {inside[0]!r}: try {'.*' + compiled.pattern + '.*'!r}" if inside else ""
            raise ValueError(
                f"the rule {pattern!r} matches no path (a rule matches whole paths)"
                + (
                    hint
                    or tree.close_to(compiled.pattern, paths)
                    or f"; the paths are {', '.join(list(paths)[:5])} ..."
                )
            )
        fresh = [path for path in matched if path not in first]
        if not fresh:
            raise ValueError(
                f"the rule {pattern!r} matches {matched[0]!r}, but {first[matched[0]]!r} comes first there and the "
                "rule has no path to itself: put it before, or take it out"
            )
        first.update(dict.fromkeys(fresh, pattern))
    return first


def _placed(path: str, chosen: Variant | Placed, leaf: Any, sites: Mapping[str, Site] | None) -> tuple[Variant, Site]:
    """The variant and the site of one adapted leaf, once both are known to make sense."""
    shape = tuple(leaf.shape)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"{path!r} is {leaf.dtype}{list(shape)}, and only floating-point leaves train: leave it out")
    if sites is not None and (path not in sites or sites[path].shape != shape):
        found = f"shape {sites[path].shape}" if path in sites else "nothing"
        raise ValueError(f"{path!r} has shape {shape}, but sites has {found} there: trace the function with this tree")
    site = _by_shape(leaf) if sites is None else sites[path]
    if site.kind == "unused":
        raise ValueError(f"{path!r}: the traced function does not read it, so it would not train: leave it out")
    if isinstance(chosen, Placed):
        window, variant = site.window_axes, chosen.variant
        site = chosen.site(path, shape, site.kind)
        site = dataclasses.replace(site, window_axes=tuple(d for d in window if d in site.in_axes))
    else:
        variant = chosen
    if variant.needs_axes and not site.adaptable:
        if sites is None:
            remedy = (
                "pass sites=lora.sites(fun, params, ...), or give the axes in the rule: .at(in_axes=..., out_axes=...)"
            )
            raise ValueError(f"{path!r} has shape {shape}, and only a matrix is (in, out) by itself: {remedy}")
        use = next((use for use in site.uses if use.kind in ("other", "vector")), None)
        how = f"used whole, by {use.primitive!r} at {use.where}" if use else "handed on as it is"
        raise ValueError(
            f"{path!r} {shape} is {how}, so a low-rank update of it would have to be formed: leave it out, train it "
            'with Full(), or give its axes in the rule, .at(in_axes=..., out_axes=...), and lift(materialize="allow")'
        )
    if variant.needs_axes and site.kind not in variant.kinds:
        name = type(variant).__name__
        raise ValueError(
            f"{path!r} is of kind {site.kind!r}, and {name} adapts leaves of kind {', '.join(variant.kinds)} alone: "
            "give it another variant, such as LoRA(rank=8), or leave it out"
        )
    return variant, dataclasses.replace(site, uses=())


def _by_shape(leaf: Any) -> Site:
    """A leaf whose use is not known: a matrix is (in, out)."""
    shape = tuple(leaf.shape)
    return Site(shape, "linear", (), (0,), (1,)) if len(shape) == 2 else Site(shape, "other")

"""Groups of leaves that differ in the number of their layer alone, as tables show them."""

from __future__ import annotations

import re


def pattern(path: str) -> str:
    """A path with a star for each layer's number.

    >>> pattern("params/layers_3/up/kernel"), pattern("model.layers.11.self_attn.q_proj")
    ('params/layers_*/up/kernel', 'model.layers.*.self_attn.q_proj')
    """
    return re.sub(r"(?<=[._/])\d+(?=[./]|$)", "*", path)

"""Config: which entry of adapter_config.json is for a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def matched(module: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """As PEFT looks it up: the first pattern that matches the end of the name, from the start or after a dot."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def feeds_forward(module: str, config: Mapping[str, Any]) -> bool:
    """Whether IA³ scales a module's inputs."""
    names = config.get("feedforward_modules") or []
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module.endswith(tuple(names))

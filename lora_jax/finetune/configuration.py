"""Configuration: settings in a YAML or TOML file, each with its line, and the file that repeats a run."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from lora_jax.finetune.settings import Settings
from lora_jax.finetune.values import FIELDS, Given, unknown

SUFFIXES = (".yaml", ".yml", ".toml")


def read(file: str | Path) -> dict[str, Given]:
    """What a file says of settings, by name.

    Of YAML, words are taken as they are written, and each field makes of them what it holds: `1e-4` is a number, and
    `no` a word where a word is meant.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no YAML or TOML, has a key twice, or one that is no setting; the message has the line.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "run.yaml")
    >>> _ = path.write_text("rank: 4\\nlearning_rate: 1e-4\\n")
    >>> [(name, given.value, given.where.rpartition(":")[2]) for name, given in read(path).items()]
    [('rank', '4', '1'), ('learning_rate', '1e-4', '2')]
    """
    file = Path(file)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: a file of settings is named {', '.join(f'*{x}' for x in SUFFIXES)}: rename it")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of settings: correct --config")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    found = _toml(file, text) if file.suffix == ".toml" else _yaml(file, text)
    for name, given in found.items():
        if name not in FIELDS:
            raise unknown(name, given.where)
    return found


def written(settings: Settings) -> str:
    """All settings as YAML, in groups.

    >>> print(written(Settings(model="base", learning_rate=1e-5)).splitlines()[1])
    model: base
    """
    lines, group = [], None
    for name, field in FIELDS.items():
        if field.metadata["group"] != group:
            lines += ([""] if lines else []) + [f"# {field.metadata['group']}"]
            group = field.metadata["group"]
        value = getattr(settings, name)
        value = list(value) if isinstance(value, tuple) else value
        lines.append(yaml.safe_dump({name: value}, allow_unicode=True, width=10**6).rstrip())
    return "\n".join([*lines, ""])


def as_json(settings: Settings) -> dict[str, Any]:
    """All settings as JSON has them, to compare."""
    plain = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _yaml(file: Path, text: str) -> dict[str, Given]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        cause = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{file}{line}: no YAML ({cause}): correct it") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file}:{root.start_mark.line + 1}: it holds no settings: write lines such as `rank: 8`")
    found: dict[str, Given] = {}
    for key, node in root.value:
        where = f"{file}:{key.start_mark.line + 1}"
        name = _plain(key, where)
        if not isinstance(name, str):
            raise ValueError(f"{where}: a key is the name of a setting: write lines such as `rank: 8`")
        if name in found:
            raise ValueError(f"{where}: {name} is set twice, first at {found[name].where}: take one of them out")
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        found[name] = Given(_plain(node, where), where, quoted)
    return found


def _plain(node: Any, where: str) -> Any:
    """A node as words: as they are written, whatever YAML would make of them."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(part, where) if isinstance(part, yaml.ScalarNode) else None for part in node.value]
    words = {}
    for key, part in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name in words:
            raise ValueError(f"{where.rpartition(':')[0]}:{key.start_mark.line + 1}: {name} is set twice: take one out")
        words[name] = part.value if isinstance(part, yaml.ScalarNode) else []
    return words


def _toml(file: Path, text: str) -> dict[str, Given]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        raise ValueError(f"{file}{f':{found[1]}' if found else ''}: no TOML ({error}): correct it") from error
    lines = text.splitlines()

    def line(name: str) -> int:
        """Where a name stands, which tomllib does not say: first before a sign of equality, or as a table."""
        said = rf"""\s*\[?\s*["']?{re.escape(name)}["']?\s*[\].=]"""
        return next((i for i, one in enumerate(lines, 1) if re.match(said, one)), 1)

    return {
        name: Given(value, f"{file}:{line(name)}", isinstance(value, str) and str(FIELDS[name].type)[:3] != "str")
        if name in FIELDS
        else Given(value, f"{file}:{line(name)}")
        for name, value in content.items()
    }

"""The README's code runs, block after block, and prints what it says; its commands are such as there are."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import lora_jax as lora
from lora_jax import cli
from lora_jax.finetune import configuration
from lora_jax.finetune.values import FIELDS, Given, settings

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.standard_promotion
def test_the_readme_s_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    module, printed, shown = types.ModuleType("readme"), "", 0
    monkeypatch.setitem(sys.modules, "readme", module)  # where a dataclass looks for its own
    monkeypatch.setattr(lora.Variant, "registry", dict(lora.Variant.registry))
    for language, block in blocks:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "model.py", "exec"), module.__dict__)
            printed = out.getvalue()
        elif language == "text":
            assert printed == block
            shown += 1
    assert shown >= 1


def commands(text):
    """The words of each lora-jax command in a page's blocks of sh and console."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        for part in re.split(r";|&| do ", line.split("#")[0].removeprefix("$ ")):
            words = shlex.split(part) if "lora-jax " in part else []
            names = [*map(os.path.basename, words[:2])]  # the first may set a variable
            if "lora-jax" in names:
                yield words[names.index("lora-jax") + 1 :]


def test_the_commands_shown_are_as_lora_jax_has_them():
    pages = [README, *sorted(README.parent.glob("experiments/*/README.md"))]
    found = [words for page in pages for words in commands(page.read_text())]
    for words in found:
        flags = vars(cli.parse(words))
        if words[0] == "train":
            given = {name: Given(said, f"--{name}") for name, said in flags.items() if name in FIELDS}
            settings(given)
    assert {words[0] for words in found} == {*cli.COMMANDS}


def test_the_settings_shown_are_settings(tmp_path):
    shown = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert shown
    for text in shown:
        (tmp_path / "train.yaml").write_text(text)
        settings(configuration.read(tmp_path / "train.yaml"))

"""The README's code runs, block after block, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

import lora_jax as lora

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

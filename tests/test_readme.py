"""The README's code runs, block after block, and prints what the README says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.standard_promotion
def test_the_readme_s_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    namespace, printed, shown = {"__name__": "readme"}, "", 0
    for language, block in blocks:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, "model.py", "exec"), namespace)
            printed = out.getvalue()
        elif language == "text":
            assert printed == block
            shown += 1
    assert shown >= 1

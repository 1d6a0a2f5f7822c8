"""The method that CONTRIBUTING.md shows obeys the laws, as a package of a third party."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tests.docs.pages import ROOT


@pytest.fixture
def row_gain(tmp_path):
    """The environment of a machine on which the example is installed as a package of its own."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- example: row_gain.py -->\n```python\n(.*?)```", text, re.DOTALL).group(1)
    (tmp_path / "row_gain_method.py").write_text(example)
    info = tmp_path / "row_gain-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: row-gain\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modicum.methods]\nrow_gain = row_gain_method\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_it_obeys_the_laws(row_gain):
    command = [sys.executable, "-m", "pytest", "tests/laws", "-k", "row_gain", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=row_gain, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 5


def test_plan_and_peft_know_it(row_gain):
    code = """
import json, sys
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known
import modicum
assert "MODICUM_ROW_GAIN" in {kind.value for kind in known}
from modicum.models.architecture import read_architecture
from modicum.models.plan import make_plan
print(make_plan(read_architecture("gpt3"), methods=["row_gain"], targets=["q_proj"], ranks=[4, 8]).rows[0])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=row_gain, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"rank=None, trained={96 * 12288}," in result.stdout

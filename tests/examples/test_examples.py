"""Every example runs, and stays short enough to read."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
ARGUMENTS = {"trainer": ["--steps", "20"], "trl_sft": ["--steps", "8"]}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    if file.stem.startswith("trl"):
        pytest.importorskip("trl")
    command = [sys.executable, str(file), *ARGUMENTS.get(file.stem, [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = re.search(r"loss ([\d.]+) -> ([\d.]+)", result.stdout)
    if losses:
        assert float(losses[2]) < float(losses[1])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60

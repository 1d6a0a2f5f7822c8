"""The generated pages say what the code says now, and the site builds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from tests.docs.pages import ROOT

SCRIPT = ROOT / "scripts" / "generate_docs.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_stale_page_is_noticed_and_mended(generator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- generated:baselines -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["generate_docs", "--check"])
    assert generator.main() == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["generate_docs"])
    assert generator.main() == 0
    text = page.read_text()
    assert "`r (in + out)`" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    monkeypatch.setattr(sys, "argv", ["generate_docs", "--check"])
    assert generator.main() == 0


def test_a_results_file_becomes_a_table(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert generator.part("glue") == "*Not measured yet.*"
    file = tmp_path / "benchmarks" / "quality" / "results" / "glue.json"
    file.parent.mkdir(parents=True)
    shown = {"columns": ["method", "accuracy"], "rows": [["a|b", 0.5]], "note": "3 seeds"}
    file.write_text(json.dumps({"table": shown}))
    text = generator.part("glue")
    assert "| method | accuracy |\n| --- | ---: |\n| a\\|b | 0.5 |" in text
    assert "3 seeds" in text
    assert "benchmarks/quality/results/glue.json" in text


def test_every_page_is_in_the_navigation():
    import re

    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if not page.startswith("design/")} == named


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

"""The house rules that can be counted: file lengths, floors, no traces of one machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "modicum"
_LIMITS = {"methods": 200, "cli": 120}
# data, not code; and the files people write for themselves
_TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".json", ""}


def _modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def _tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    files = [ROOT / name for name in listed.split("\0") if name]
    return [file for file in files if file.suffix in _TEXT and file.is_file() and file.stat().st_size < 2**20]


def test_no_module_is_too_long():
    faults = []
    for file in _modules():
        floor = file.relative_to(SOURCE).parts[0]
        limit = 400 if file.name.startswith("_") else _LIMITS.get(floor, 400)
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            faults.append(f"{file.relative_to(ROOT)}: {lines} lines, the limit is {limit}")
    assert not faults, "\n".join(faults)


def test_no_function_is_too_long_without_a_reason():
    faults = []
    for file in _modules():
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                # what explains a function does not make it long
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node
                length = (node.end_lineno or node.lineno) - first.lineno + 1
                if length > 60 and "# long:" not in lines[node.lineno - 1]:
                    faults.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not faults, "over 60 lines and no `# long: reason` beside the name\n" + "\n".join(faults)


def test_every_module_says_what_it_is():
    silent = [file for file in _modules() if not ast.get_docstring(ast.parse(file.read_text("utf-8")))]
    assert not silent, f"no docstring: {silent}"


def test_no_paths_of_one_machine():
    # put together so that this file does not find itself
    folders = "|".join(["/ho" + "me/", "/ro" + "ot/", "/wo" + "rk/", "/Use" + "rs/", r"/tm" + r"p/[a-z]"])
    pattern = re.compile(rf"(?<![\w.$}}>~-])({folders})")
    faults = []
    for file in _tracked():
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                faults.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not faults, "\n".join(faults)


def test_changelog_fragments_are_named_as_their_readme_says():
    names = [file.name for file in (ROOT / "changelog.d").iterdir() if file.name != "README.md"]
    assert not [
        name for name in names if not re.fullmatch(r"[a-z0-9-]+\.(added|changed|fixed|removed)\.md", name)
    ]


def test_floors():
    command = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_constraints_pin_every_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {_canonical(re.match(r"[\w.-]+", text).group()) for text in wanted} - {"modicum"}
    pinned = {
        _canonical(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    # bitsandbytes has wheels for some machines only, so there is no one version that was tested everywhere
    assert names - pinned <= {"bitsandbytes"}


def test_constraints_carry_no_build_labels():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert not [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

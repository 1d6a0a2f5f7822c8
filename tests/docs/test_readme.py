"""Every command and every Python block that the pages show works."""

from __future__ import annotations

import contextlib
import re
import shlex

import pytest
import typer
import yaml
from tests.docs.pages import PAGES, ROOT, blocks, page_id

from modicum.cli import _root

COMMANDS = [
    pytest.param(line.partition(" #")[0].strip(), id=f"{page_id(page)}: {line.strip()[:60]}")
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.strip()
]
#: their blocks need what other tests give them: a class around it (test_contributing), a server (test_experiments)
ELSEWHERE = {"CONTRIBUTING.md", "experiments.md"}
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line):
    words = shlex.split(line)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS
        return
    if words[0] != "modicum":
        assert words[:2] in (["pip", "install"], [".venv/bin/python", "-m"]), (
            f"untested kind of command: {line}"
        )
        return
    command, path, rest = _root.load(words[1]), f"modicum {words[1]}", words[2:]
    while "commands" in vars(command) and rest and not rest[0].startswith("-"):
        command, path, rest = command.commands[rest[0]], f"{path} {rest[0]}", rest[1:]
    with contextlib.suppress(typer.Exit):  # which --help ends with
        command.make_context(path, list(rest)).close()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE],
    ids=page_id,
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_first_recipe_is_one(tmp_path):
    from modicum.train.recipe import load_recipe

    (block,) = blocks(ROOT / "docs" / "learn" / "first-adapter.md", "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(block)
    recipe = load_recipe(file)
    assert (recipe.method.name, recipe.model.name_or_path) == ("lora_xs", "embedded")


def test_the_shapes_of_a_model_without_config(tmp_path):
    from modicum.models.architecture import read_architecture

    (block,) = blocks(ROOT / "docs" / "do" / "plan.md", "yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(block)
    found = read_architecture(str(file))
    assert found.name == yaml.safe_load(block)["name"]
    assert len(found.shapes()) == 2 * 24


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert not target.startswith("http"), f"{target} cannot be tested"
        assert (page.parent / target).exists(), f"{page_id(page)} links to {target}"


def test_readme_fits_one_screen_of_selling():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[5].startswith("make demo")
    assert len(lines) <= 110

"""`modicum demo`: what it prints; that it works is tested in tests/end_to_end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.cli.adapter_files import run
from tests.store.small_records import record

from modicum.store import Store
from modicum.store.record import encode, peek
from modicum.train import demo
from modicum.train.demo import METHODS, DemoResult, FormResult, MethodResult, ServedUser, demo_recipe
from modicum.train.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHARE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 400, "method": "wilson"}
RESULT = DemoResult(
    task="notes",
    summary="Notes.",
    before=SHARE | {"value": 0.0},
    methods=tuple(
        MethodResult(name, 1234, 5000, 2500, SHARE, 0.5, 100, 12.3, 700 << 20, 800 << 20) for name in METHODS
    ),
    forms=tuple(FormResult(form, 0.5, 400, 400, 1e-5, 5000) for form in demo.FORMS),
    same=True,
    seconds=100.0,
    threads=2,
    served=(ServedUser("ada", "demo/lora_xs", "hi there", True), ServedUser("bob", "demo/lora", "ho", True)),
    prompt="Say\nit.",
    example={"prompt": "Say hi.\nNote:", "wanted": "hi"},
)


@pytest.fixture
def result(monkeypatch):
    held = {"result": RESULT}
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: held["result"])
    return held


def test_the_tables(result, capsys):
    shown = run(capsys, "demo")
    assert shown.code == 0
    for words in (
        "1,234",
        "50.0% [40.0%, 60.0%]",
        "800",
        "400 of 400",
        "1.0e-05",
        "All four",
        "prompt: Say hi. Note:",
        "Two users ask one server: Say it.",
        "hi there",
    ):
        assert words in shown.out
    assert run(capsys, "demo", "--json").json["methods"][0]["peak_bytes"] == 800 << 20


def test_the_store_at_the_end(result, capsys, tmp_path):
    lines = [dataclasses.replace(method, after={"value": 0.25}) for method in RESULT.methods]
    for line in lines:
        file = tmp_path / line.method / demo.RECORD
        file.parent.mkdir()
        file.write_bytes(encode(record(len(line.method))))
    result["result"] = dataclasses.replace(RESULT, stored=demo._store(tmp_path, lines))
    shown = run(capsys, "demo").out
    for words in (
        "demo/lora_xs@1",
        "demo/vera@1",
        "production",
        "25.0%",
        peek(encode(record(4))).digest[:12],
    ):
        assert words in shown
    with Store(tmp_path / demo.STORE) as store:
        assert store.show("demo/lora_xs@production").metrics == {"exact_match": 0.25, "loss": 0.5}
        assert store.verify().ok


def test_answers_that_differ_are_an_error(result, capsys):
    result["result"] = dataclasses.replace(RESULT, same=False)
    shown = run(capsys, "demo")
    assert shown.code == 1
    assert "THE ANSWERS DIFFER" in shown.out


def test_a_server_that_answers_otherwise_is_an_error(result, capsys):
    wrong = dataclasses.replace(RESULT.served[0], as_offline=False)
    result["result"] = dataclasses.replace(RESULT, served=(wrong, RESULT.served[1]))
    shown = run(capsys, "demo")
    assert shown.code == 1
    assert "NO" in shown.out


def test_a_server_that_answers_all_users_alike_is_an_error(result, capsys):
    ada, bob = RESULT.served
    result["result"] = dataclasses.replace(RESULT, served=(ada, dataclasses.replace(bob, answer=ada.answer)))
    shown = run(capsys, "demo")
    assert shown.code == 1
    assert "THE SAME ANSWER" in shown.out


def test_without_the_extra_it_is_said(result, capsys):
    result["result"] = dataclasses.replace(RESULT, served=())
    shown = run(capsys, "demo")
    assert shown.code == 0
    assert "pip install 'modicum[serve]'" in shown.out


def test_a_folder_in_use_is_left_alone(result, tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    assert "not empty" in run(capsys, "demo", "--output", tmp_path).err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_the_recipe_files_are_what_the_demo_runs(method):
    from_file = load_recipe(RECIPES / f"demo_{method}.yaml")
    assert from_file == demo_recipe(method)
    assert from_file.digest() == demo_recipe(method).digest()

"""Suites: the bundled ones, own ones, and what is said about wrong ones."""

from __future__ import annotations

import pytest
import yaml
from tests.docs.pages import ROOT, blocks
from tests.small_checkpoints import write_jsonl

from modicum.errors import ConfigError, DataError
from modicum.evaluate.protocols import PROTOCOLS, check
from modicum.evaluate.suites import bundled, load_suite, task_rows

ROWS = [{"id": f"t-{n}", "question": f"{n}?", "answer": "ab"[n % 2]} for n in range(4)]
TASK = {
    "data": "t/test",
    "template": "Q: {question}",
    "reference": "answer",
    "extract": "choice",
    "answers": ["a", "b"],
}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "t").mkdir()
    write_jsonl(tmp_path / "t" / "test.jsonl", ROWS)
    return tmp_path


def suite_of(folder, task=None, **fields):
    tasks = {"t": {**TASK, **(task or {})}}
    values = {"suite": "own", "protocol": "llm-adapters", "tasks": tasks, **fields}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def test_every_bundled_suite_is_for_the_protocol_in_its_name():
    for name, protocols in bundled().items():
        for protocol in protocols:
            suite = load_suite(name, protocol)
            assert (suite.name, suite.protocol) == (name, protocol)
            assert protocol in PROTOCOLS
            assert suite.about


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "protocol", "sizes"),
    [
        ("commonsense", "llm-adapters", [2599, 1443, 1573, 2034, 1014, 1914, 938, 414]),
        ("math", "llm-adapters", [1069, 3991]),
        ("glue", "classifier", [824, 685, 1357, 2382, 4370, 217, 1197, 1599]),
    ],
)
def test_bundled_suites_fit_the_data(shared_data, name, protocol, sizes):
    found = check(load_suite(name, protocol), shared_data)
    assert not found.faults
    assert [len(task.ids) for task in found.tasks] == sizes


def test_an_own_suite(data):
    suite = load_suite(suite_of(data, defaults={"num_beams": 2}))
    (task,) = check(suite, data).tasks
    assert task.ids == ["t-0", "t-1", "t-2", "t-3"]
    assert task.decoding == {"num_beams": 2, "max_new_tokens": 32}
    assert not task.notes
    assert len(check(suite, data, limit=3).tasks[0].ids) == 3


def test_the_template_is_told_by_its_digest(data):
    first = check(load_suite(suite_of(data)), data).tasks[0].template
    assert check(load_suite(suite_of(data, {"num_beams": 3})), data).tasks[0].template == first
    assert check(load_suite(suite_of(data, {"template": "Q:{question}"})), data).tasks[0].template != first


def test_suites_that_do_not_exist():
    with pytest.raises(ConfigError, match="did you mean 'commonsense'"):
        load_suite("comonsense")
    with pytest.raises(ConfigError, match=r"protocols llm-adapters and lm-eval, whose.*cannot be compared"):
        load_suite("commonsense")
    with pytest.raises(ConfigError, match="cannot be run under 'lm-evals' \\(did you mean 'lm-eval'"):
        load_suite("commonsense", "lm-evals")
    with pytest.raises(ConfigError, match=r"no suite none\.yaml"):
        load_suite("none.yaml")


def test_a_suite_is_for_one_protocol(data):
    with pytest.raises(ConfigError, match="never mixed"):
        load_suite(suite_of(data), "lm-eval")


def test_all_faults_of_a_file_at_once(data):
    path = suite_of(data, protocol=None, taks={}, tasks={"a/b": 3})
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    for part in ("'taks' (did you mean 'tasks'?)", "protocol is missing", "tasks.a/b must be a mapping"):
        assert part in str(caught.value)
    (data / "own.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_suite(path)


def test_tasks_by_name(data):
    suite = load_suite("glue")
    assert list(suite.only(["rte", "cola"]).tasks) == ["cola", "rte"]
    assert suite.only([]).tasks == suite.tasks
    with pytest.raises(ConfigError, match="no task 'colaa' \\(did you mean 'cola'"):
        suite.only(["colaa"])


def test_an_unknown_protocol(data):
    with pytest.raises(ConfigError, match="did you mean 'lm-eval'"):
        check(load_suite(suite_of(data, protocol="lmeval")), data)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"templat": "x"}, "t: templat (did you mean 'template'?)"),
        ({"num_beams": 0}, "num_beams: Input should be greater than or equal to 1"),
        ({"template": "Q: {qestion}"}, "'qestion' (did you mean 'question'?)"),
        ({"template": "Q"}, "names no column"),
        ({"reference": "anser"}, "'anser' (did you mean 'answer'?)"),
        ({"answers": ["a", "c"]}, "answer = 'b' is none of a, c"),
        ({"answers": ["a"]}, "at least two different answers"),
        ({"extract": "number"}, "answer = 'a' is no number"),
        ({"extract": "own.py:f"}, "no file"),
        ({"data": "t/tset"}, "did you mean 'test'?"),
        ({"data": "u/test"}, "does not exist"),
    ],
)
def test_what_is_wrong_with_a_task(data, change, fault):
    (found,) = check(load_suite(suite_of(data, change)), data).faults
    assert fault in found


def test_an_answer_that_never_occurs_is_noted(data):
    (task,) = check(load_suite(suite_of(data, {"answers": ["a", "b", "c"]})), data).tasks
    assert task.notes == ["no item has the answer c"]


def test_ids_must_be_there_and_differ(data):
    rows = [*ROWS, {**ROWS[0], "id": "t-1"}, {**ROWS[0], "id": None}]
    write_jsonl(data / "t" / "test.jsonl", rows)
    (fault,) = check(load_suite(suite_of(data)), data).faults
    assert "test.jsonl:5: the id 't-1' is that of test.jsonl:2" in fault
    assert "test.jsonl:6: no id" in fault
    write_jsonl(data / "t" / "test.jsonl", [{"question": "?", "answer": a} for a in "ab"])
    assert check(load_suite(suite_of(data)), data).tasks[0].ids == ["test.jsonl:1", "test.jsonl:2"]


def test_the_page_lists_every_bundled_suite_and_shows_one_that_works(tmp_path):
    page = ROOT / "docs" / "do" / "evaluate.md"
    lines = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    shown = {(cells[1].strip(), cells[2].strip()) for cells in lines[2:]}
    assert shown == {(name, protocol) for name, known in bundled().items() for protocol in known}
    (block,) = blocks(page, "yaml")
    (tmp_path / "colours.yaml").write_text(block, encoding="utf-8")
    (tmp_path / "own.py").write_text("def colour(text, row):\n    return text.split()[0]\n", encoding="utf-8")
    (tmp_path / "colours").mkdir()
    rows = [{"question": "blue and yellow", "answer": "green", "kind": "paint"}]
    write_jsonl(tmp_path / "colours" / "test.jsonl", rows)
    write_jsonl(tmp_path / "colours" / "names.jsonl", rows)
    found = check(load_suite(str(tmp_path / "colours.yaml")), tmp_path)
    assert not found.faults
    assert found.tasks[0].notes == ["no item has the answer orange, violet"]


def test_data_by_its_whole_path(data):
    assert len(task_rows(data / "elsewhere", str(data / "t" / "test.jsonl"))) == 4
    with pytest.raises(DataError, match="endings such as"):
        task_rows(data, "t/other")

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


def test_the_rows_are_told_by_their_digest(data):
    def digest(rows, limit=None):
        write_jsonl(data / "t" / "test.jsonl", rows)
        return check(load_suite(suite_of(data)), data, limit).tasks[0].rows

    first = digest(ROWS)
    assert (
        digest(ROWS, limit=2) == digest(ROWS[::-1]) == digest([{**row, "seen": 1} for row in ROWS]) == first
    )
    assert digest([*ROWS[:3], {**ROWS[3], "question": "4?"}]) != first
    assert digest([*ROWS[:3], {**ROWS[3], "answer": "a"}]) != first


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


def test_data_of_the_hub_by_name(data, monkeypatch):
    """A folder stands for a data set on the hub, which `datasets` reads alike."""
    (data / "someone" / "sums").mkdir(parents=True)
    write_jsonl(data / "someone" / "sums" / "validation.jsonl", ROWS)
    write_jsonl(
        data / "someone" / "sums" / "test.jsonl", [{**row, "id": f"u-{row['id']}"} for row in ROWS[:2]]
    )
    monkeypatch.chdir(data)
    suite = load_suite(suite_of(data, {"data": "hub:someone/sums::validation"}))
    (task,) = check(suite, data / "no such folder").tasks
    assert task.ids == ["t-0", "t-1", "t-2", "t-3"]
    assert [row["id"] for row in task_rows(data, "hub:someone/sums").rows] == ["u-t-0", "u-t-1"]
    (fault,) = check(load_suite(suite_of(data, {"data": "hub:someone/none:main:test"})), data).faults
    assert "'someone/none'" in fault
    assert "loaded from the hub (split test, configuration main)" in fault


#: metrics of GLUE by its paper (Wang et al. 2018), the number of classes, 0 for a score
GLUE = {
    "cola": (["matthews"], 2), "sst2": (["accuracy"], 2), "mrpc": (["accuracy", "f1"], 2),
    "qqp": (["accuracy", "f1"], 2), "stsb": (["pearson", "spearman"], 0), "mnli": (["accuracy"], 3),
    "qnli": (["accuracy"], 2), "rte": (["accuracy"], 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def every_file(tmp_path_factory):
    """A data folder with five rows for every bundled task, which have all columns that any task asks for."""
    folder = tmp_path_factory.mktemp("data")
    texts = (
        "sentence",
        "sentence1",
        "sentence2",
        "question1",
        "question2",
        "premise",
        "hypothesis",
        "instruction",
    )
    more = {"problem": "1+1", "level": "1", "type": "sums", "subject": "anatomy", "text": "A text."}
    suites = [load_suite(name, protocol) for name, known in bundled().items() for protocol in known]
    rows: dict[str, dict] = {}
    for task, options in (one for suite in suites for one in suite.tasks.items()):
        count = {"mmlu": 4, "social_iqa": 3}.get(task, 2)
        for file in (options["data"], options.get("examples", options["data"])):
            row = rows.setdefault(file, {
                **dict.fromkeys(texts, "a text"), **more, "question": "Is _ a word?", "final": "2",
                "answer": "so\n#### 2" if task == "gsm8k" else "2", "choices": ["x", "y", "z", "w"][:count], "label": 1,
            })  # fmt: skip
            if options.get("answers"):
                row["answer"] = options["answers"][0]
    for file, row in rows.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / f"{file}.jsonl", [{**row, "id": str(n)} for n in range(5)])
    return folder


def bundled_tasks(name, protocol, folder):
    if protocol == "lm-eval":
        pytest.importorskip("lm_eval")
    found = check(load_suite(name, protocol), folder)
    assert not found.faults
    return {task.name: task for task in found.tasks}


def test_glue_is_measured_by_its_official_metrics(every_file):
    tasks = bundled_tasks("glue", "classifier", every_file)
    assert {n: (task.options.metrics, task.options.labels) for n, task in tasks.items()} == GLUE
    apart = bundled_tasks("mnli", "classifier", every_file)
    assert {name: task.options.metrics for name, task in apart.items()} == {
        "mnli_matched": ["accuracy"], "mnli_mismatched": ["accuracy"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "protocol", "decodings"),
    [
        ("commonsense", "llm-adapters", [{"num_beams": 4, "max_new_tokens": 32}] * 8),
        ("math", "llm-adapters", [
            {"num_beams": 1, "max_new_tokens": most, "stop": ["Instruction", "Response"]} for most in (1024, 2048)]),
        ("commonsense", "lm-eval", [{"num_fewshot": 0}] * 7),
        ("math", "lm-eval", [{"num_fewshot": 5}]),
        ("mmlu", "lm-eval", [{"num_fewshot": 5}]),
    ],
)  # fmt: skip
def test_the_bundled_suites_ask_as_their_protocols_say(every_file, name, protocol, decodings):
    tasks = bundled_tasks(name, protocol, every_file)
    for task, decoding in zip(tasks.values(), decodings, strict=True):
        assert {key: task.decoding[key] for key in decoding} == decoding
    if protocol == "llm-adapters":
        extracts = {"commonsense": ["choice"] * 8, "math": ["number", "math"]}[name]
        assert [task.options.extract for task in tasks.values()] == extracts
        assert {task.options.closing for task in tasks.values()} == {"The answer is: "}


def test_the_prompts_of_the_papers(every_file):
    """Each told as facts: two headings around the instruction, and the blanks that code indented in a text leaves."""
    prompt = bundled_tasks("commonsense", "llm-adapters", every_file)["piqa"]._prompts[0]
    lines = prompt.split("\n")
    assert [line.strip() for line in lines[1:]] == ["", "### Instruction:", "a text", "", "### Response:", ""]
    assert lines[0].split(". ")[0] == "Below is an instruction that describes a task"
    assert lines[0].endswith("completes the request. ")
    indents = [len(line) - len(line.lstrip()) for line in lines]
    assert [indents[place] for place in (0, 2, 3, 5)] == [0, 16, 16, 16]
    assert lines[-1] == " " * 16
    math = bundled_tasks("math", "llm-adapters", every_file)
    for name, question in (("gsm8k", "Is _ a word?"), ("math", "1+1")):
        first, *rest = math[name]._prompts[0].split("\n")
        assert first == lines[0].rstrip()
        assert rest == ["", "### Instruction:", question, "", "### Response: Let's think step by step."]


@pytest.mark.shared_data
def test_boolq_is_asked_without_its_passage(shared_data):
    """Nothing but the question differs from one prompt to the next."""
    (task,) = check(load_suite("commonsense", "llm-adapters").only(["boolq"]), shared_data).tasks
    around = {
        prompt.replace(row["question"], "", 1) for prompt, row in zip(task._prompts, task._rows, strict=True)
    }
    (words,) = around
    assert "passage" not in words
    assert len(words) < 400


def test_data_by_its_whole_path(data):
    assert len(task_rows(data / "elsewhere", str(data / "t" / "test.jsonl"))) == 4
    with pytest.raises(DataError, match="endings such as"):
        task_rows(data, "t/other")

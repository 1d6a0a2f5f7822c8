"""Evaluations in experiment trackers: the real clients on local stores, read back."""

from __future__ import annotations

import json

import pytest
from tests.cli.adapter_files import run

from modicum.evaluate.records import Records

SUITE = """\
suite: small
protocol: perplexity
tasks:
  texts: { data: texts }
"""


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # no server, no address: the client's own default, a file in the current folder
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN"):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_experiment("Default")
    (tmp_path / "texts.txt").write_text(
        "A quiet river runs by the old mill.\nThe mill stands still today.\n" * 3
    )
    yield mlflow
    mlflow.set_tracking_uri(None)


def found_by_suite(capsys, tracker):
    """What the suite in the working directory found, after telling it to `tracker` and to tensorboard."""
    done = run(
        capsys, "eval", "-m", "embedded", "--suite", "suite.yaml", "--data-dir", ".", "-o", "found",
        "--report-to", tracker, "--report-to", "tensorboard", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_evaluations_and_suites_in_mlflow(tracked, tmp_path, capsys):
    (tmp_path / "suite.yaml").write_text(SUITE)
    done = run(capsys, "eval", "-m", "embedded", "-d", "texts.txt", "--report-to", "mlflow", "--json")
    assert done.code == 0, done.err
    on_rows = json.loads(done.out)
    assert on_rows["resources"]["cpu_seconds"] > 0
    found = found_by_suite(capsys, "mlflow")
    client = tracked.MlflowClient()
    runs = {
        one.info.run_name: one
        for one in client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    }
    assert set(runs) == {"eval embedded on texts.txt", "eval embedded on small"}

    rows = runs["eval embedded on texts.txt"].data
    for name, measure in on_rows["metrics"].items():
        for part in ("low", "high", "n"):
            assert rows.metrics[f"{name}/{part}"] == measure[part]
        assert rows.metrics[name] == measure["value"]
        assert rows.params[f"{name}.interval"] == measure["method"]
    assert rows.metrics["resources/seconds"] == on_rows["resources"]["seconds"]

    suite = runs["eval embedded on small"]
    for name, measure in found["results"][0]["tasks"]["texts"]["metrics"].items():
        assert suite.data.metrics[f"texts/{name}"] == measure["value"]
        # one text alone has no interval
        assert suite.data.metrics.get(f"texts/{name}/low") == measure["low"]
    header = Records.read(tmp_path / "found" / "texts.parquet").header
    assert suite.data.params["texts.base_fingerprint"] == header.base_fingerprint
    assert suite.data.params["protocol"] == "perplexity"
    assert suite.data.params["machine.threads"] == "1"
    files = client.list_artifacts(suite.info.run_id)
    assert {file.path for file in files} == {"summary.json", "texts.parquet"}
    assert suite.data.metrics["resources/seconds"] == found["resources"]["seconds"]
    assert list((tmp_path / "found" / "logs").glob("events.out.*"))


def test_suites_in_trackio_and_tensorboard(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_PROJECT", "suites")
    (tmp_path / "texts.txt").write_text("A quiet river runs by the old mill.\nThe mill stands still today.\n")
    (tmp_path / "suite.yaml").write_text(SUITE)
    found = found_by_suite(capsys, "trackio")
    metrics = found["results"][0]["tasks"]["texts"]["metrics"]
    wanted = {f"texts/{name}": measure["value"] for name, measure in metrics.items()}
    wanted |= {"texts/perplexity/n": metrics["perplexity"]["n"]}
    wanted |= {"resources/cpu_seconds": found["resources"]["cpu_seconds"]}
    events = EventAccumulator(str(tmp_path / "found" / "logs")).Reload()
    (logged,) = SQLiteStorage.get_logs("suites", "eval embedded on small")
    for name, value in wanted.items():
        (tensor,) = events.Tensors(name)
        assert tensor.tensor_proto.double_val[0] == value, name
        assert logged[name] == value, name
    (one,) = trackio.Api().runs("suites")
    header = Records.read(tmp_path / "found" / "texts.parquet").header
    assert one.config["texts.base_fingerprint"] == header.base_fingerprint
    (facts,) = events.Tensors("facts/text_summary")
    assert f"| protocol | {header.protocol} |" in facts.tensor_proto.string_val[0].decode()


def test_what_an_interrupted_suite_took_counts_when_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("A quiet river runs by the old mill.\n")
    (tmp_path / "suite.yaml").write_text(SUITE)
    command = ("eval", "-m", "embedded", "--suite", "suite.yaml", "--data-dir", ".", "-o", "found", "--json")
    assert run(capsys, *command).code == 0
    file = tmp_path / "found" / "resources.json"
    before = json.loads(file.read_text())
    before["attempts"][0]["cpu_seconds"] += 1000
    file.write_text(json.dumps(before))
    again = json.loads(run(capsys, *command, "--resume").out)
    assert again["resources"]["cpu_seconds"] > 1000
    assert json.loads(file.read_text())["total"] == again["resources"]


def test_a_refused_suite_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.yaml").write_text(SUITE)
    done = run(capsys, "eval", "-m", "embedded", "--suite", "suite.yaml", "--data-dir", ".", "-o", "found")
    assert done.code == 1
    assert not (tmp_path / "found").exists()


def test_unknown_trackers_are_refused_before_anything_is_measured(capsys):
    done = run(capsys, "eval", "-m", "embedded", "-d", "gone.txt", "--report-to", "mlfow")
    assert done.code == 1
    assert "report_to = 'mlfow' (did you mean 'mlflow'?)" in done.err

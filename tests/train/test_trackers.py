"""Experiment trackers: the real clients, on local stores, read back and compared with the run's own report."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import socket
from pathlib import Path

import pytest
from tests.small_checkpoints import recipe_values

from modicum.errors import ConfigError, MissingExtraError
from modicum.train.recipe import make_recipe
from modicum.train.run import tune


@pytest.fixture(autouse=True)
def _local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # MLflow would tell its makers what is used
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_NESTED_RUN", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """One store for all tests: to make its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/tracked.db"


@pytest.fixture
def mlflow(request, database, monkeypatch):
    """The client on a local store, with an experiment for each test."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    mlflow.set_experiment(request.node.name)
    yield mlflow
    while mlflow.active_run() is not None:
        mlflow.end_run()


def runs_of(mlflow, condition: str = "") -> list:
    client = mlflow.MlflowClient()
    return client.search_runs(
        [client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"]).experiment_id], condition
    )


def recipe(tmp_path, report_to, **changes):
    values = recipe_values(tmp_path)
    values["train"]["report_to"] = report_to
    return make_recipe({**values, **changes})


def final_numbers(report: dict) -> dict[str, float]:
    """What a tracker must know at the end, by the names it must have; written out by hand."""
    return {
        "before/loss": report["metrics"]["before"]["loss"],
        "validation/loss": report["metrics"]["validation"]["loss"],
        "validation/n": report["metrics"]["validation"]["n"],
        "trained_values/adapter": report["trained_values"]["adapter"],
        "stored_bytes/total": report["stored_bytes"]["total"],
        "resources/cpu_seconds": report["resources"]["cpu_seconds"],
        "resources/peak_memory_bytes": report["resources"]["peak_memory_bytes"],
    }


def test_mlflow_holds_what_the_report_holds(tmp_path, mlflow):
    result = tune(recipe(tmp_path, "mlflow"))
    client = mlflow.MlflowClient()
    (run,) = runs_of(mlflow)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == str(result.folder)
    for name, value in final_numbers(result.report).items():
        assert run.data.metrics[name] == value, name
    assert run.data.params["recipe.method.name"] == "lora"
    assert run.data.params["modicum.recipe_digest"] == result.report["recipe_digest"]
    # the Trainer's own integration logs the course of it
    course = client.get_metric_history(run.info.run_id, "eval_loss")
    losses = {entry["step"]: entry["eval_loss"] for entry in result.report["history"] if "eval_loss" in entry}
    assert {point.step: point.value for point in course} == losses
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"recipe.yaml", "report.json"}
    path = client.download_artifacts(run.info.run_id, "report.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == result.report
    assert mlflow.active_run() is None


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path, mlflow, monkeypatch):
    from tests.train.test_run import StopError, stop_at

    broken = recipe(tmp_path, "mlflow")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(StopError):
            tune(broken)
    (run,) = runs_of(mlflow)
    assert run.info.status == "FAILED"
    assert mlflow.active_run() is None
    result = tune(broken, resume=True)
    (again,) = runs_of(mlflow)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    for name, value in final_numbers(result.report).items():
        assert again.data.metrics[name] == value, name


def test_a_run_that_the_caller_has_open_stays_open(tmp_path, mlflow):
    with mlflow.start_run() as mine:
        result = tune(recipe(tmp_path, "mlflow"))
        assert mlflow.active_run().info.run_id == mine.info.run_id
    (run,) = runs_of(mlflow)
    assert run.data.metrics["validation/loss"] == result.metrics["validation"]["loss"]


def test_the_runs_of_a_sweep_carry_its_name_and_its_means_are_a_run_of_their_own(tmp_path, mlflow):
    swept = recipe(tmp_path, "mlflow", sweep={"learning_rate": [1e-3], "seeds": [0, 1]})
    result = tune(swept)
    runs = runs_of(mlflow, f"params.`modicum.sweep` = '{result.folder}'")
    by_name = {run.info.run_name.removeprefix(str(result.folder)): run for run in runs}
    assert set(by_name) == {"", "/lr=0.001/seed=0", "/lr=0.001/seed=1"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    means = result.report["metrics"]["validation"]["loss"]
    found = by_name[""].data.metrics
    assert [found[f"validation/loss{end}"] for end in ("", "/low", "/high")] == [
        means["value"],
        means["low"],
        means["high"],
    ]
    cells = [
        json.loads((result.folder / "lr=0.001" / f"seed={seed}" / "report.json").read_text())
        for seed in (0, 1)
    ]
    assert (
        by_name["/lr=0.001/seed=1"].data.metrics["validation/loss"]
        == (cells[1]["metrics"]["validation"]["loss"])
    )
    used = result.report["resources"]
    assert used["seconds"] > sum(cell["resources"]["seconds"] for cell in cells)
    assert found["resources/cpu_seconds"] == used["cpu_seconds"]
    assert not (result.folder / "checkpoints").exists()


def test_trackio_holds_what_the_report_holds(tmp_path):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    result = tune(recipe(tmp_path, "trackio"))
    # the store is one for all tests, the names of folders are not
    (run,) = [run for run in trackio.Api().runs("modicum") if run.name == str(result.folder)]
    assert run.config["recipe.method.name"] == "lora"
    logs = SQLiteStorage.get_logs("modicum", run.name)
    for name, value in final_numbers(result.report).items():
        assert logs[-1][name] == value, name
    losses = [entry["eval/loss"] for entry in logs if "eval/loss" in entry]
    assert losses == [entry["eval_loss"] for entry in result.report["history"] if "eval_loss" in entry]


def test_tensorboard_holds_what_the_report_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tune(recipe(tmp_path, "tensorboard"))
    events = EventAccumulator(str(result.folder / "logs")).Reload()
    for name, value in final_numbers(result.report).items():
        (tensor,) = events.Tensors(name)
        assert tensor.step == result.report["steps"]
        assert tensor.tensor_proto.double_val[0] == value, name
    losses = [event.value for event in events.Scalars("eval/loss")]
    wanted = [entry["eval_loss"] for entry in result.report["history"] if "eval_loss" in entry]
    assert losses == pytest.approx(wanted, rel=1e-6)


def test_several_trackers_at_once(tmp_path, mlflow):
    result = tune(recipe(tmp_path, ["mlflow", "tensorboard"]))
    assert list((result.folder / "logs").glob("events.out.*"))
    (run,) = runs_of(mlflow)
    assert run.data.metrics["validation/loss"] == result.metrics["validation"]["loss"]


def test_a_server_that_does_not_answer_is_warned_of_once_and_stops_no_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.warns(RuntimeWarning, match="mlflow does not take the results") as caught:
        result = tune(recipe(tmp_path, "mlflow"))
    assert len(caught) == 1
    assert result.report["steps"] == 6


def test_a_tracker_that_breaks_in_the_middle_stops_no_run_and_nothing_later(tmp_path, mlflow, monkeypatch):
    from transformers.integrations.integration_utils import MLflowCallback

    def full(self, *args, **kwargs):
        raise OSError(28, "the server is full")

    with monkeypatch.context() as patch:
        patch.setattr(MLflowCallback, "on_log", full)
        with pytest.warns(RuntimeWarning, match="the server is full") as caught:
            result = tune(recipe(tmp_path, "mlflow", output=str(tmp_path / "first")))
    assert len(caught) == 1
    assert result.report["steps"] == 6
    assert mlflow.active_run() is None
    second = tune(recipe(tmp_path, "mlflow", output=str(tmp_path / "second")))
    runs = {run.info.run_name: run for run in runs_of(mlflow)}
    assert runs[str(tmp_path / "first")].info.status == "FAILED"
    found = runs[str(second.folder)]
    assert found.data.metrics["validation/loss"] == second.metrics["validation"]["loss"]


def test_a_tracker_without_its_client_is_told_of_before_anything_is_written(tmp_path, monkeypatch):
    absent = {"wandb", "mlflow"}
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else original(name, *rest)
    )
    wanted = recipe(tmp_path, ["wandb", "mlflow", "tensorboard"])
    with pytest.raises(MissingExtraError, match=r"mlflow is not installed: pip install wandb modicum\[track"):
        tune(wanted)
    assert not wanted.folder.exists()


def test_clients_print_nothing_among_the_results(tmp_path, capsys):
    from modicum.evaluate.tracking import attempt

    assert attempt("x", lambda: builtins.print("hello"))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


def test_unknown_trackers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.report_to\.1 = 'mlfow'"):
        recipe(tmp_path, ["trackio", "mlfow"])
    assert recipe(tmp_path, "none").train.report_to == []
    assert recipe(tmp_path, "mlflow").train.report_to == ["mlflow"]
    assert recipe(tmp_path, "none").digest() == recipe(tmp_path, ["mlflow"]).digest()

"""What evaluations send to experiment trackers: metrics with intervals, protocol, conditions, and the records."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modicum.evaluate.conditions import load, machine
from modicum.evaluate.records import SUFFIX, Records
from modicum.evaluate.tracking import Findings, flat, numbers_of, publish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modicum.evaluate.run_suite import SuiteResult

#: what of a record's header is the same for all tasks, and stands in the result
_OF_RESULT = ("protocol", "protocol_version", "suite", "task", "model", "adapter")


def publish_evaluation(trackers: Sequence[str], result: Mapping[str, Any]) -> None:
    """Send the JSON of `modicum eval` on rows to `trackers`."""
    names = ("task", "model", "adapter", "data")
    facts = {name: result[name] for name in names} | _methods(result["metrics"]) | _machine()
    numbers = {**measures(result["metrics"]), **numbers_of({"resources": result["resources"]})}
    title = f"eval {result['model']}{_carried(result)} on {result['data']}"
    publish(trackers, title, Findings(numbers | {"rows": result["rows"]}, facts))


def publish_suites(
    trackers: Sequence[str],
    results: Sequence[SuiteResult],
    folders: Sequence[Path],
    resources: Mapping[str, Any],
) -> None:
    """Send `results`, whose records are in `folders`, each as a run of its own.

    `resources`: what all of them took together; sent only where there is one, for shares of it are not known.
    """
    for result, folder in zip(results, folders, strict=True):
        files = sorted(folder.glob(f"*{SUFFIX}"))
        values = result.as_dict()
        numbers: dict[str, float] = {}
        facts = {name: value for name, value in values.items() if name not in {"tasks", "average"}}
        for task, found in values["tasks"].items():
            numbers |= {f"{task}/{name}": value for name, value in measures(found["metrics"]).items()}
            facts |= {f"{task}.{name}": value for name, value in _methods(found["metrics"]).items()}
        for file in files:
            header = asdict(Records.read(file).header)
            conditions = {name: value for name, value in header.items() if name not in _OF_RESULT}
            facts |= flat({header["task"]: conditions}, between=".")
        numbers |= numbers_of({"average": values["average"]})
        if len(results) == 1:
            numbers |= numbers_of({"resources": resources})
        title = f"eval {result.model}{_carried(values)} on {result.suite}"
        findings = Findings(numbers, {**facts, **_machine()}, [folder / "summary.json", *files])
        publish(trackers, title, findings, folder / "logs")


def measures(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The values of `metrics` under their names, and `NAME/low`, `NAME/high` and `NAME/n`."""
    return numbers_of(
        {
            key: number
            for name, measure in metrics.items()
            for key, number in (
                (name, measure["value"]),
                *((f"{name}/{part}", measure[part]) for part in ("low", "high", "n") if part in measure),
            )
        }
    )


def _methods(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.interval": measure["method"] for name, measure in metrics.items()}


def _machine() -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {f"machine.{k}": v for k, v in asdict(machine(device, torch.get_num_threads(), load())).items()}


def _carried(result: Mapping[str, Any]) -> str:
    return f" + {result['adapter']}" if result["adapter"] else ""

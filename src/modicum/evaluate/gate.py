"""Gates: what a version must keep to before it is released, measured from files, with a verdict for each."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from modicum.errors import DataError, ModicumError, did_you_mean
from modicum.evaluate.ab import Aligned, align, check_same, pair, read_version, shown, shown_difference
from modicum.evaluate.gate_file import Gate, read_gates
from modicum.evaluate.intervals import bootstrap
from modicum.evaluate.metrics import perplexity
from modicum.store.atomic import write_text
from modicum.store.model_inspection import OK, inspect_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modicum.evaluate import gate_file as kinds
    from modicum.store.model_inspection import ModelInspection


@dataclass(frozen=True)
class Verdict:
    """What became of one gate."""

    name: str
    kind: str
    passed: bool
    #: what was compared: files, models, tasks, items
    compared: str
    #: what was measured and the limit, in words
    shown: str
    limit_shown: str
    #: both as numbers, in `unit`; None where nothing could be measured
    measured: float | None = None
    limit: float | None = None
    unit: str = ""
    #: why nothing could be measured
    error: str | None = None


@dataclass(frozen=True)
class GateReport:
    """All gates of a file."""

    file: str
    passed: bool
    verdicts: tuple[Verdict, ...]


def check_gates(path: str | Path) -> GateReport:
    """The verdicts of all gates in the YAML file `path`; what cannot be measured has failed and says why.

    Paths in the file are relative to the current folder.

    Raises:
        ConfigError: the file of gates itself is wrong.
    """
    verdicts = tuple(_verdict(gate) for gate in read_gates(path))
    return GateReport(str(path), all(verdict.passed for verdict in verdicts), verdicts)


def write_json(report: GateReport, path: Path) -> None:
    """Write the report as JSON to `path`."""
    write_text(path, json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")


def write_junit(report: GateReport, path: Path) -> None:
    """Write the report to `path` as the JUnit XML that CI systems read.

    A failure there is a limit that was not kept, an error a gate that could not be measured.
    """
    failed = sum(not v.passed and v.error is None for v in report.verdicts)
    counts = {
        "tests": str(len(report.verdicts)),
        "failures": str(failed),
        "errors": str(sum(v.error is not None for v in report.verdicts)),
    }
    root = ET.Element("testsuites", {"name": "modicum gate", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": report.file, **counts})
    for verdict in report.verdicts:
        case = ET.SubElement(
            suite,
            "testcase",
            {"classname": f"gate.{verdict.kind}", "name": f"{verdict.name}: {verdict.compared}"},
        )
        text = f"{verdict.shown}; limit: {verdict.limit_shown}"
        if verdict.error is not None:
            ET.SubElement(case, "error", {"message": verdict.error}).text = verdict.error
        elif not verdict.passed:
            ET.SubElement(case, "failure", {"message": text}).text = text
        else:
            ET.SubElement(case, "system-out").text = text
    ET.indent(root)
    write_text(path, ET.tostring(root, "unicode", xml_declaration=True) + "\n")


def _verdict(gate: Gate) -> Verdict:
    kind = gate.kind
    options = getattr(gate, kind)
    make = partial(Verdict, kind=kind)
    compared, check = _CHECKS[kind]
    name = gate.name or kind.replace("_", " ")
    try:
        return check(options, partial(make, name=name, compared=compared(options)))
    except (ModicumError, OSError) as error:
        said = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        return make(name=name, compared=compared(options), passed=False, shown="", limit_shown="", error=said)


def _not_worse(options: kinds.NotWorse, make: Callable[..., Verdict]) -> Verdict:
    new, old = str(options.records), str(options.than)
    parts = align({"new": read_version(options.records), "old": read_version(options.than)}, options.metric)
    found = pair(
        _chosen(parts, options.task, options.metric), "new", "old", options.metric, 1 - options.confidence
    )
    low, high = found.difference.low, found.difference.high
    if low is None or high is None:
        raise DataError(f"{new} and {old} share {found.n} item, which is too few for an interval")
    # what is lost at the far end of the interval
    worst = {"correct": -low, "loss": high, "perplexity": high - 1}[options.metric]
    return make(
        passed=worst <= options.margin,
        shown=f"{shown_difference(found.difference, options.metric)} ({found.n:,} items)",
        limit_shown=f"worse by at most {options.by} at {options.confidence:.0%}",
        measured=worst,
        limit=options.margin,
        unit={"correct": "share lost", "loss": "nats lost", "perplexity": "share gained"}[options.metric],
    )


def _metric(options: kinds.MetricLimit, make: Callable[..., Verdict]) -> Verdict:
    items = _chosen(
        align({"new": read_version(options.records)}, options.metric), options.task, options.metric
    )
    value = float(items.values["new"].sum() / items.weights.sum())
    value = perplexity(value) if options.metric == "perplexity" else value
    least = options.at_least is not None
    return _limited(
        make,
        value,
        (options.at_least if least else options.at_most) or 0.0,
        shown=f"{options.metric} {shown(value, options.metric)} ({len(items):,} items)",
        word=lambda limit: shown(limit, options.metric),
        unit=options.metric,
        least=least,
    )


def _size(options: kinds.Size, make: Callable[..., Verdict]) -> Verdict:
    path = options.path.expanduser()
    if not path.exists():
        raise DataError(f"nothing at {path}")
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files)
    return _limited(
        make, total, options.at_most, shown=f"{total:,} bytes", word=lambda n: f"{n:,.0f} bytes", unit="bytes"
    )


def _latency(options: kinds.LatencyLimit, make: Callable[..., Verdict]) -> Verdict:
    times, baseline = _times(options)
    name = options.model or next(iter(sorted(set(times) - {baseline})))
    seconds, q = times[name], {"median": 0.5, "p95": 0.95}[options.quantile]
    value = float(np.quantile(seconds, q))
    words = f"{options.of} of {name}, {options.quantile} of {len(seconds)} turns: {value * 1e3:.3g} ms"
    if options.at_most is not None:
        return _limited(
            make, value, options.at_most, shown=words, word=lambda s: f"{s * 1e3:.3g} ms", unit="seconds"
        )
    limit = options.at_most_times_baseline
    assert limit is not None
    # whole rounds are drawn, so that a load that slowed both cancels out
    both = (np.asarray(seconds), np.asarray(times[baseline]))
    spread = bootstrap(both, lambda ours, base: float(np.quantile(ours, q) / np.quantile(base, q)))
    return make(
        passed=spread.value <= limit,
        shown=f"{words}, {spread.value:.3f} [{spread.low:.3f}, {spread.high:.3f}] times that of {baseline}",
        limit_shown=f"at most {limit:g} times the baseline's",
        measured=spread.value,
        limit=limit,
        unit="times the baseline",
    )


def _times(options: kinds.LatencyLimit) -> tuple[dict[str, list[float]], str]:
    """The seconds of every model in a bench, and the baseline's name."""
    try:
        bench = json.loads(options.bench.expanduser().read_text(encoding="utf-8"))
        times = {model["name"]: model[f"{options.of}_seconds"] for model in bench["models"]}
        baseline = bench["baseline"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{options.bench} is no output of `modicum bench --output`: {error!r}") from error
    others = [name for name in times if name != baseline]
    known = ", ".join(times)
    if options.model is None and len(others) != 1:
        raise DataError(f"{options.bench} holds {known}; name one with `model`")
    if options.model is not None and options.model not in times:
        raise DataError(
            f"{options.bench} has no {options.model!r}{did_you_mean(options.model, times)}; it has {known}"
        )
    lacking = [name for name in (options.model or others[0], baseline) if not times.get(name)]
    if lacking:
        raise DataError(f"{options.bench} has no {options.of} times of {', '.join(lacking)}")
    return times, baseline


def _same(options: kinds.Same, make: Callable[..., Verdict]) -> Verdict:
    versions = {str(path): read_version(path) for path in (options.records, options.other)}
    if len(versions) < 2:
        raise DataError(f"{options.records} is compared with itself")
    check_same(versions)
    first, second = versions.values()
    furthest, worst, other, n = 0.0, "", [], 0
    for task, records in first.items():
        theirs = {one.item: one for one in second[task].items}
        for one in records.items:
            twin, n = theirs[one.item], n + 1
            if (one.prediction, one.correct, one.tokens) != (twin.prediction, twin.correct, twin.tokens) or (
                one.loss is None
            ) != (twin.loss is None):
                other.append(f"{task}/{one.item}")
            elif one.loss is not None and twin.loss is not None:
                apart = abs(one.loss - twin.loss) / max(1, one.tokens or 1)
                # what is not a number agrees with nothing
                apart = math.inf if math.isnan(apart) else apart
                if apart > furthest:
                    furthest, worst = apart, f"{task}/{one.item}"
    said = f"{len(other)} of {n:,} items answered otherwise" + (f" (first: {other[0]})" if other else "")
    where = f" ({worst})" if worst else ""
    return make(
        passed=not other and furthest <= options.tolerance,
        shown=f"{said}; losses apart by up to {furthest:.3g} nats per token{where}",
        limit_shown=f"no other answer, losses within {options.tolerance:g} nats per token",
        measured=furthest,
        limit=options.tolerance,
        unit="nats per token",
    )


def _sparsity(options: kinds.Sparsity, make: Callable[..., Verdict]) -> Verdict:
    found = _inspected(options.model)
    if found.sparsity is None:
        raise DataError(f"{options.model} has no linear layers whose zeros could be counted")
    said = f"{found.sparsity:.2%} zeros in {len(found.layers)} linear layers"
    return _limited(
        make,
        found.sparsity,
        options.at_least,
        shown=said,
        word="{:.2%}".format,
        unit="share of zeros",
        least=True,
    )


def _parameters(options: kinds.Parameters, make: Callable[..., Verdict]) -> Verdict:
    found = _inspected(options.model)
    if found.parameters is None:
        raise DataError(f"{options.model} is in a format whose parameters cannot be counted ({found.kind})")
    said = f"{found.parameters:,} parameters"
    return _limited(
        make,
        found.parameters,
        options.at_most,
        shown=said,
        word="{:,.0f}".format,
        unit="parameters",
    )


def _limited(
    make: Callable[..., Verdict],
    measured: float,
    limit: float,
    *,
    shown: str,
    word: Callable[[float], str],
    unit: str,
    least: bool = False,
) -> Verdict:
    """The verdict on a number that must be at most, or at least, the limit that `word` writes."""
    return make(
        passed=measured >= limit if least else measured <= limit,
        shown=shown,
        limit_shown=f"at {'least' if least else 'most'} {word(limit)}",
        measured=measured,
        limit=limit,
        unit=unit,
    )


def _inspected(folder: Path) -> ModelInspection:
    place = folder.expanduser()
    if not (place / "config.json").is_file():
        raise DataError(f"no model folder {place}: there is no config.json")
    found = inspect_model(place)
    if found.state != OK:
        raise DataError(f"{place}: {found.state}")
    return found


def _chosen(parts: dict[str, Aligned | None], task: str | None, metric: str) -> Aligned:
    """The items of one task, or of all that have the metric."""
    if task is None:
        return Aligned.joined([part for part in parts.values() if part is not None])
    part = parts.get(task)
    if part is None:
        known = [name for name, there in parts.items() if there is not None]
        raise DataError(
            f"no task {task!r} with {metric}{did_you_mean(task, known)}; there are {', '.join(known)}"
        )
    return part


def _task(options: Any) -> str:
    return f", {options.task}" if options.task else ""


#: of each kind, what is compared, and what decides
_CHECKS: dict[str, tuple[Callable[[Any], str], Callable[[Any, Callable[..., Verdict]], Verdict]]] = {
    "not_worse": (lambda o: f"{o.records} against {o.than}{_task(o)}, {o.metric}", _not_worse),
    "metric": (lambda o: f"{o.records}{_task(o)}, {o.metric}", _metric),
    "size": (lambda o: str(o.path), _size),
    "latency": (lambda o: f"{o.bench}, {o.model or 'its model'}, {o.of} {o.quantile}", _latency),
    "same": (lambda o: f"{o.records} and {o.other}", _same),
    "sparsity": (lambda o: str(o.model), _sparsity),
    "parameters": (lambda o: str(o.model), _parameters),
}

"""What became of a fleet: how gains are distributed, whom the base model serves better, whose rows are at fault."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.evaluate.metrics import LARGER_IS_BETTER
from modicum.fleet.page import page
from modicum.store.atomic import write_text
from modicum.train.artifacts import write_json, write_table
from modicum.train.run import versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from modicum.fleet.ledger import Ledger, Outcome
    from modicum.fleet.sizing import Sizes
    from modicum.fleet.spec import FleetSpec

REPORT = "report.json"
#: the same as tables to read, and one row for every user
MARKDOWN, PAGE, USERS = "report.md", "report.html", "users.parquet"
#: what can become of a user
STATES = {
    "stored": "adapter in the store",
    "base": "the base model is better, nothing stored",
    "diverged": "training diverged, nothing stored",
    "faulty": "rows at fault, nothing stored",
}
#: users listed by name in reports; all of them are in the table of users
_SHOWN = 100
_BINS = 20
#: how many interquartile ranges beyond the quartiles an outlier lies (Tukey 1977)
_FENCE = 1.5
_LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def summary(spec: FleetSpec, about: Mapping[str, Any], ledger: Ledger, sized: Sizes) -> dict[str, Any]:
    """The report of a finished job, as plain values; `about`: what it says of the base model."""
    outcomes = ledger.outcomes()
    seconds, cohorts = ledger.clock, ledger.finished().values()
    counts = Counter(one.state for one in outcomes)
    trained = sum(counts[state] for state in ("stored", "base", "diverged"))
    unread, places = ledger.unread(_SHOWN)
    part = "test" if any(one.detail.get("test") for one in outcomes) else "held_out"
    users = [_row(one, spec, part) for one in outcomes]
    return {
        "kind": "fleet",
        "digest": spec.digest(),
        "spec": spec.model_dump(mode="json"),
        "learning_rate": spec.learning_rate,
        "users": {"all": len(outcomes), **{state: counts[state] for state in STATES}},
        "rows": {name: sum(one[f"rows_{name}"] or 0 for one in users) for name in ("given", "train")},
        "unread": {"rows": unread, "first": places},
        "metric": spec.metric,
        "measured_on": part,
        "gains": gains(users, spec.metric),
        "timing": {
            "seconds": seconds,
            "adapters_per_hour": 3600 * trained / seconds if seconds else None,
            "steps": sum(one["steps"] or 0 for one in users),
            "cohorts": len(cohorts),
            # more where several were trained at a time
            "seconds_of_cohorts": sum(took for took, _ in cohorts),
        },
        "sizes": sized.as_dict(),
        **about,
        "versions": versions(),
        "faults": [_fault(one) for one in outcomes if one.state in ("faulty", "diverged")][:_SHOWN],
        "notes": [_noted(one) for one in outcomes if one.detail.get("notes")][:_SHOWN],
        "table": users,
    }


def gains(users: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """How the gains of the users' adapters over the base model are distributed; larger is better.

    A gain is what `metric` became better by on rows that were not trained on. `kept`: of stored adapters alone.
    `served`: of all trained users, zero where the base model stays.
    """
    stored = np.array([one["gain"] for one in users if one["state"] == "stored" and one["gain"] is not None])
    others = [one["user"] for one in users if one["state"] == "base"]
    if not len(stored):
        return {
            "kept": None,
            "served_mean": 0.0 if others else None,
            "outliers": [],
            "base_better": others[:_SHOWN],
        }
    served = float(stored.sum() / (len(stored) + len(others)))
    low, high = np.quantile(stored, (0.25, 0.75))
    reach = _FENCE * (high - low)
    far = [
        {"user": one["user"], "gain": one["gain"], "rows": one["rows_train"], "version": one["version"]}
        for one in users
        if one["state"] == "stored"
        and one["gain"] is not None
        and not low - reach <= one["gain"] <= high + reach
    ]
    far.sort(key=lambda one: one["gain"])
    middle = max(0, len(far) - _SHOWN)
    counts, edges = np.histogram(stored, bins=_BINS)
    return {
        "kept": {
            "n": len(stored),
            "mean": float(stored.mean()),
            "quantiles": {f"{level:g}": float(np.quantile(stored, level)) for level in _LEVELS},
            "better": float((stored > 0).mean()),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
            "before": _mean(users, "before", metric),
            "after": _mean(users, "after", metric),
        },
        "served_mean": served,
        "outliers": far[: _SHOWN // 2] + far[max(_SHOWN // 2, _SHOWN // 2 + middle) :],
        "outliers_in_all": len(far),
        "base_better": others[:_SHOWN],
    }


def write_reports(folder: Path, report: dict[str, Any]) -> None:
    """Returns when all reports are in `folder`, `report.json` last: it marks the job as finished.

    The entries of single users go to `users.parquet` and leave the report, in place.
    """
    users = report.pop("table")
    write_table(folder / USERS, users)
    write_text(folder / MARKDOWN, markdown(report))
    write_text(folder / PAGE, page(report, tables(report)))
    write_json(folder / REPORT, report)


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, columns, rows) of everything in a report that is a table."""
    counts, gain, timing = report["users"], report["gains"], report["timing"]
    found = [
        (
            "Users",
            ["what became of them", "users"],
            [[text, f"{counts[state]:,}"] for state, text in STATES.items()]
            + [["all", f"{counts['all']:,}"]],
        )
    ]
    kept = gain["kept"]
    if kept is not None:
        rows = [["mean", _number(kept["mean"])]]
        rows += [[f"{100 * float(level):g} %", _number(value)] for level, value in kept["quantiles"].items()]
        rows += [
            ["share that is better", f"{kept['better']:.1%}"],
            ["mean over all trained users, zero where the base stays", _number(gain["served_mean"])],
            [f"{report['metric']} of the base, mean over these users", _number(kept["before"])],
            [f"{report['metric']} with their adapters", _number(kept["after"])],
        ]
        title = f"Gain in {report['metric']} of stored adapters on {_part(report)} (larger is better)"
        found.append((title, ["", "gain"], rows))
    if gain["outliers"]:
        rows = [
            [one["user"], _number(one["gain"]), str(one["rows"]), one["version"]] for one in gain["outliers"]
        ]
        found.append(
            (f"Outliers ({gain['outliers_in_all']})", ["user", "gain", "training rows", "version"], rows)
        )
    for title, key in (("Users at fault", "faults"), ("Notes", "notes")):
        if report[key]:
            rows = [[one["user"], str(one["rows"]), one["what"]] for one in report[key]]
            found.append((title, ["user", "rows", "what"], rows))
    if report["unread"]["rows"]:
        title = f"Rows of nobody ({report['unread']['rows']:,})"
        found.append((title, ["what"], [[text] for text in report["unread"]["first"]]))
    rate = timing["adapters_per_hour"]
    rows = [
        ["seconds of training", f"{timing['seconds']:,.0f}"],
        ["adapters trained per hour", f"{rate:,.0f}" if rate else "–"],
        ["steps of single users", f"{timing['steps']:,}"],
        ["cohorts", str(timing["cohorts"])],
        ["training rows", f"{report['rows']['train']:,}"],
    ]
    return [*found, ("Time", ["", ""], rows)]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    spec = report["spec"]
    lines = [
        f"# Fleet on {spec['model']['name_or_path']}",
        "",
        f"{spec['method']['name']}, digest {report['digest']}, seed {spec['train']['seed']}, {report['device']}.",
    ]
    for title, columns, rows in tables(report):
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _row(one: Outcome, spec: FleetSpec, part: str) -> dict[str, Any]:
    """One user as a flat row."""
    detail, counts = one.detail, one.detail.get("rows", {})
    before = detail.get("before" if part == "held_out" else "test_before") or {}
    after = detail.get(part) or {}
    sign = 1 if LARGER_IS_BETTER[spec.metric] else -1
    found = {
        "user": one.user,
        "state": one.state,
        "version": detail.get("version"),
        "gain": None,
        "before": before.get(spec.metric),
        "after": after.get(spec.metric),
        **{f"rows_{name}": counts.get(name) for name in ("given", "usable", "train", "held_out", "test")},
        "steps": detail.get("steps"),
        "best_step": detail.get("best_step"),
        "fault": detail.get("fault"),
        "notes": "; ".join(detail.get("notes", [])) or None,
    }
    if found["before"] is not None and found["after"] is not None and math.isfinite(found["after"]):
        found["gain"] = sign * (found["after"] - found["before"])
    return found


def _fault(one: Outcome) -> dict[str, Any]:
    what = one.detail.get("fault") or f"diverged after {one.detail.get('steps')} steps"
    return {"user": one.user, "rows": one.detail.get("rows", {}).get("given", 0), "what": what}


def _noted(one: Outcome) -> dict[str, Any]:
    rows = one.detail.get("rows", {}).get("given", 0)
    return {"user": one.user, "rows": rows, "what": "; ".join(one.detail["notes"])}


def _mean(users: Iterable[Mapping[str, Any]], key: str, metric: str) -> float | None:
    del metric
    found = [one[key] for one in users if one["state"] == "stored" and one[key] is not None]
    return float(np.mean(found)) if found else None


def _part(report: Mapping[str, Any]) -> str:
    if report["measured_on"] == "test":
        return "test rows, which decided nothing"
    return "held-out rows, which also chose the step that was kept"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

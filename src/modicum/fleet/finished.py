"""How fast a fleet was: out of the folder of a job, also an unfinished one, its report, or a plan's JSON."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, DataError, ModicumError, listing
from modicum.fleet.job import SPEC
from modicum.fleet.ledger import FILE, Ledger
from modicum.fleet.measure import RECORDS, bytes_each, enough
from modicum.fleet.pace import steps_of
from modicum.fleet.rates import Measured, Rate
from modicum.fleet.report import REPORT
from modicum.fleet.sample import in_order, sampled
from modicum.fleet.sizing import Sizes
from modicum.fleet.spec import make_fleet
from modicum.fleet.work import work_of
from modicum.store import Put, Store
from modicum.train.artifacts import read_json
from modicum.train.yaml_lines import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modicum.fleet.ledger import Outcome, User
    from modicum.fleet.spec import FleetSpec


def read_measured(path: Path) -> Measured:
    """How fast a fleet was: that of a job's folder, of its `report.json`, or of what a plan wrote as JSON.

    Raises:
        ConfigError: it is nothing of the kind, or no cohort of the job is finished.
    """
    if (path / FILE).is_file():
        return _of_job(path)
    file = path / REPORT if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is no measured fleet ({error}): take the folder of a job, its report.json, or what "
            "`modicum plan --fleet … --measure 30 --json` wrote"
        ) from error
    if isinstance(found, dict) and found.get("kind") == "fleet":
        return _of_report(found, str(path))
    values = found.get("measured") if isinstance(found, dict) else None
    return Measured.of(values if isinstance(values, dict) else {})


def _of_job(folder: Path) -> Measured:
    """How fast the finished cohorts of a job were, by tokens if its users' rows are still there, else by steps."""
    report = read_json(folder / REPORT) or {}
    try:
        text = (folder / SPEC).read_text(encoding="utf-8")
        spec = make_fleet(read_yaml(text, str(folder / SPEC))[0], str(folder / SPEC))
        with Ledger(folder) as ledger:
            took, known = ledger.finished(), ledger.fact("sizes")
            users, outcomes = in_order(ledger.users()), ledger.outcomes()
            workers = ledger.fact("workers") or 1
    except (OSError, sqlite3.DatabaseError) as error:
        raise ConfigError(f"the job in {folder} cannot be read: {error}") from error
    if not took:
        raise ConfigError(f"no cohort of the fleet in {folder} is finished, so that nothing was measured yet")
    sized, states = Sizes(**known), [one.state for one in outcomes]
    device, notes, unit = report.get("device", "cpu"), [], "all_tokens"
    parts = {at: users[at * sized.users : (at + 1) * sized.users] for at in sorted(took)}
    try:
        work = _tokens(parts, spec, sized, 8 if device.startswith("cuda") else 1)
    except (ModicumError, OSError) as error:
        unit, work = "steps", _steps(parts, outcomes, spec)
        notes.append(f"the rows of the measured job cannot be counted any more: {error}")
    kept = [at for at in parts if work[at]]
    if not kept:
        raise ConfigError(f"nobody in the finished cohorts of {folder} has trained")
    trained = sum(states.count(state) for state in ("stored", "base", "diverged"))
    container, index = _bytes_in(spec, outcomes)
    return Measured(
        what=f"{len(kept)} cohorts of the job in {folder}{_by(workers)}",
        model=spec.model.name_or_path,
        method=spec.method.name,
        ranks=tuple(spec.all_ranks),
        device=device,
        threads=sized.threads,
        tokens_per_pass=sized.tokens,
        cohort_size=sized.users,
        rates={unit: Rate(tuple(work[at] for at in kept), tuple(workers * took[at] for at in kept))},
        stored=states.count("stored") / trained if trained else 1.0,
        token_bytes=sized.token_bytes,
        container_bytes=container,
        index_bytes=index,
        early_stopping=spec.train.early_stopping_patience,
        notes=tuple(notes),
    )


def _of_report(report: Mapping[str, Any], where: str) -> Measured:
    """How fast a job was by its report alone, which knows steps and no tokens."""
    try:
        sized, timing, users = Sizes(**report["sizes"]), report["timing"], report["users"]
        trained, workers = users["stored"] + users["base"] + users["diverged"], timing.get("workers", 1)
        return Measured(
            what=f"the report in {where}{_by(workers)}",
            model=report["spec"]["model"]["name_or_path"],
            method=report["spec"]["method"]["name"],
            ranks=tuple(map(int, report["numbers_per_adapter"])),
            device=report["device"],
            threads=sized.threads,
            tokens_per_pass=sized.tokens,
            cohort_size=sized.users,
            rates={"steps": Rate((timing["steps"],), (workers * timing["seconds"],))},
            stored=users["stored"] / trained,
            token_bytes=sized.token_bytes,
            early_stopping=report["spec"]["train"]["early_stopping_patience"],
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where} is no report of a fleet that trained anybody ({error!r})") from error


def _by(workers: int) -> str:
    """Who trained it, where several did at the same time: a cohort's seconds are then those of one of them."""
    return f", {workers} workers at a time" if workers > 1 else ""


def _tokens(
    parts: Mapping[int, Sequence[User]], spec: FleetSpec, sized: Sizes, multiple: int
) -> dict[int, int]:
    """Tokens of each cohort, counted on its users' rows as they are now.

    Raises:
        DataError: they are others than those that were trained on.
    """
    lengths = {one.user: one for one in sampled(spec, None).users}
    users = [one for part in parts.values() for one in part]
    changed = [
        one.user
        for one in users
        if one.user not in lengths or lengths[one.user].order[:2] != (one.rows, one.bytes)
    ]
    if changed:
        raise DataError(f"those of {listing(changed, 3)} in {spec.users.source} are not what they were")
    return {
        at: work_of(
            [lengths[one.user] for one in part], spec.train, sized.tokens, multiple=multiple
        ).all_tokens
        for at, part in parts.items()
    }


def _steps(
    parts: Mapping[int, Sequence[User]], outcomes: Sequence[Outcome], spec: FleetSpec
) -> dict[int, int]:
    """Steps that the users of each cohort were to make."""
    rows = {one.user: one.detail.get("rows", {}).get("train", 0) for one in outcomes if one.state != "faulty"}
    return {
        at: sum(steps_of(rows[one.user], spec.train) for one in part if rows.get(one.user))
        for at, part in parts.items()
    }


def _bytes_in(spec: FleetSpec, outcomes: Sequence[Outcome]) -> tuple[float | None, float | None]:
    """Bytes beyond the numbers, of a record and of index and log for it, of a job's own adapters; None without them."""
    versions = [one.detail["version"] for one in outcomes if one.detail.get("version")]
    try:
        with Store(spec.store.path) as store:
            known = [store.show(version) for version in versions[:RECORDS]]
            known = known[: enough(max((one.bytes for one in known), default=1))]
            puts = [
                Put(
                    one.name,
                    store.get_bytes(str(one)),
                    data_digest=one.data_digest,
                    seed=one.seed,
                    metrics=one.metrics,
                    tags=one.tags,
                    alias=one.aliases[0] if one.aliases else None,
                    source=f"fleet {spec.folder.name}",
                )
                for one in known
            ]
            numbers = [store.get(str(one)).values.nbytes for one in known]
    except ModicumError:
        return None, None
    if not puts:
        return None, None
    record, index, _ = bytes_each(puts)
    return record - sum(numbers) / len(numbers), index

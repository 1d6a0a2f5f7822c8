"""How fast a fleet was: out of the folder of a job, also an unfinished one, its report, or a plan's JSON."""

from __future__ import annotations

import json
import sqlite3
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, ModicumError
from modicum.fleet.job import SPEC
from modicum.fleet.ledger import FILE, Ledger
from modicum.fleet.measure import RECORDS, bytes_each, enough
from modicum.fleet.pace import steps_of
from modicum.fleet.rates import Measured, Rate
from modicum.fleet.report import REPORT
from modicum.fleet.sample import in_order
from modicum.fleet.sizing import Sizes
from modicum.fleet.spec import make_fleet
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
    """How fast the finished cohorts of a job were, by tokens if these were noted, else by steps."""
    report = read_json(folder / REPORT) or {}
    try:
        text = (folder / SPEC).read_text(encoding="utf-8")
        spec = make_fleet(read_yaml(text, str(folder / SPEC))[0], str(folder / SPEC))
        with Ledger(folder) as ledger:
            done, known = ledger.finished(), ledger.fact("sizes")
            users, outcomes = in_order(ledger.users()), ledger.outcomes()
            device = (ledger.fact("about") or report).get("device", "cpu")
    except (OSError, sqlite3.DatabaseError) as error:
        raise ConfigError(f"the job in {folder} cannot be read: {error}") from error
    if not done:
        raise ConfigError(f"no cohort of the fleet in {folder} is finished, so that nothing was measured yet")
    sized, states = Sizes(**known), [one.state for one in outcomes]
    notes, unit = [], "all_tokens"
    work = {at: tokens for at, (_, tokens) in sorted(done.items()) if tokens is not None}
    if not work:
        unit, work = "steps", _steps(sorted(done), users, sized.users, outcomes, spec)
        notes.append("an older modicum trained the measured job, and did not note the tokens of its cohorts")
    kept = [at for at, amount in work.items() if amount]
    if not kept:
        raise ConfigError(f"nobody in the finished cohorts of {folder} has trained")
    trained = sum(states.count(state) for state in ("stored", "base", "diverged"))
    container, index = _bytes_in(spec, outcomes)
    return Measured(
        what=f"{len(kept)} cohorts of the job in {folder}",
        model=spec.model.name_or_path,
        method=spec.method.name,
        ranks=tuple(spec.all_ranks),
        device=device,
        threads=sized.threads,
        tokens_per_pass=sized.tokens,
        cohort_size=sized.users,
        rates={unit: Rate(tuple(work[at] for at in kept), tuple(done[at][0] for at in kept))},
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
        trained = users["stored"] + users["base"] + users["diverged"]
        # an older modicum told the time on the clock, and how many cohorts shared it
        shared = timing["seconds"] * timing.get("workers", 1)
        return Measured(
            what=f"the report in {where}",
            model=report["spec"]["model"]["name_or_path"],
            method=report["spec"]["method"]["name"],
            ranks=tuple(map(int, report["numbers_per_adapter"])),
            device=report["device"],
            threads=sized.threads,
            tokens_per_pass=sized.tokens,
            cohort_size=sized.users,
            rates={"steps": Rate((timing["steps"],), (timing.get("seconds_of_cohorts", shared),))},
            stored=users["stored"] / trained,
            token_bytes=sized.token_bytes,
            early_stopping=report["spec"]["train"]["early_stopping_patience"],
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where} is no report of a fleet that trained anybody ({error!r})") from error


def _steps(
    cohorts: Sequence[int], users: Sequence[User], size: int, outcomes: Sequence[Outcome], spec: FleetSpec
) -> dict[int, int]:
    """Steps that the users of each cohort were to make; `users` in the order of cohorts, so many in each."""
    rows = {one.user: one.detail.get("rows", {}).get("train", 0) for one in outcomes if one.state != "faulty"}
    return {
        at: sum(
            steps_of(rows[one.user], spec.train)
            for one in users[at * size : (at + 1) * size]
            if rows.get(one.user)
        )
        for at in cohorts
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

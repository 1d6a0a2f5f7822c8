"""What `modicum plan --fleet` says of the fleet out of books after a minute of trying, and what that fleet then took.

Its job is that of `books.py`, whose committed result is read; run this on the same machine, with as many threads.

    python benchmarks/fleet/predicted.py [--data ../shared/data] [--seconds 60] [--threads 4]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.cli._common import jsonable
from modicum.fleet.plan import Asked
from modicum.fleet.planning import plan_fleet

if TYPE_CHECKING:
    from modicum.fleet.plan import FleetPlan

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FLEET = HERE.parents[1] / "recipes" / "fleet" / "users.yaml"


def predicted(data: Path, seconds: float, threads: int) -> FleetPlan:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "users.jsonl"
        command = [sys.executable, str(HERE / "users.py"), "--data", str(data), "--output", str(rows)]
        subprocess.run(command, check=True)
        return plan_fleet(FLEET, [f"users.source='{rows}'"], Asked(), measure=seconds, threads=threads)


def table(plan: FleetPlan, books: dict[str, Any], threads: int) -> dict[str, Any]:
    hours, stored = plan.hours, books["store"]
    interval = "" if hours.low is None else f" ({3600 * hours.low:,.0f} … {3600 * (hours.high or 0):,.0f})"
    record = (plan.store["numbers"] + plan.store["containers"]) / plan.adapters
    rows = [
        ["users", f"{plan.users:,}", f"{books['users']['all']:,}"],
        ["cohorts", f"{plan.cohorts:,}", f"{books['timing']['cohorts']:,}"],
        ["steps of users", f"{plan.work.steps:,}", f"{books['timing']['steps']:,}"],
        ["seconds of training", f"{3600 * hours.value:,.0f}{interval}", f"{books['timing']['seconds']:,.0f}"],
        ["bytes of an adapter", f"{record:,.0f}", f"{stored['bytes_checked'] / stored['versions']:,.0f}"],
    ]
    tried = plan.measured.what
    note = f"{tried[0].upper()}{tried[1:]}, {threads} threads; the interval is that of the speed."
    return {"columns": ["fleet out of books", "planned", "measured"], "rows": rows, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=4)
    given = parser.parse_args()
    plan = predicted(given.data, given.seconds, given.threads)
    books = json.loads((RESULTS / "fleet_books.json").read_text(encoding="utf-8"))
    values = {
        "what": "the plan of a fleet against the fleet",
        "command": f"python benchmarks/fleet/predicted.py --seconds {given.seconds:g} --threads {given.threads}",
        "versions": {name: version(name) for name in ("modicum", "torch")},
        "plan": jsonable(plan),
        "table": table(plan, books, given.threads),
    }
    print(json.dumps(values["table"], indent=1))
    (RESULTS / "fleet_predicted.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

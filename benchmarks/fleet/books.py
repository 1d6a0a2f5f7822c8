"""A fleet of 2,048 users out of real books: trained, stored and evaluated on this machine, and how long that takes.

Users and rows are those of `users.py`: one user is one stretch of one book. The fleet is `recipes/fleet/users.yaml`.
It is judged by test rows, which decided nothing; the evaluation reads every adapter out of the store again. Killed, it
goes on when it is run again with the same folder; `serve_books.py` serves what is in it.

    python benchmarks/fleet/books.py --work build/books [--data ../shared/data] [--users 2048] [--threads 4]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from modicum.evaluate.resources import resident_peak
from modicum.fleet.evaluate import evaluate_fleet
from modicum.fleet.job import Progress, train_fleet
from modicum.fleet.spec import load_fleet
from modicum.store import Store

HERE = Path(__file__).parent
RESULT = HERE / "results" / "fleet_books.json"
FLEET = HERE.parents[1] / "recipes" / "fleet" / "users.yaml"


def shown(last: list[float]) -> Any:
    """A line on the terminal every half a minute."""

    def tell(now: Progress) -> None:
        if now.seconds - last[0] > 30:
            last[0] = now.seconds
            rate, left = now.adapters_per_hour, now.seconds_left / 60
            print(
                f"{now.users}/{now.of_users} users, {rate:,.0f} adapters/h, {left:.0f} min left", flush=True
            )

    return tell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of rows, store and job; may be removed after"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--users", type=int, default=2048, help="with fewer nothing is written")
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = arguments.work / "users.jsonl"
    if not rows.is_file():
        command = [
            sys.executable,
            str(HERE / "users.py"),
            "--data",
            str(arguments.data),
            "--output",
            str(rows),
        ]
        subprocess.run([*command, "--users", str(arguments.users)], check=True)
    store = arguments.work / "store"
    changes = [f"users.source='{rows}'", f"store.path='{store}'", f"output='{arguments.work / 'run'}'"]
    spec = load_fleet(FLEET, changes)
    began = time.perf_counter()
    report = train_fleet(spec, resume=(arguments.work / "run").is_dir(), tell=shown([0.0])).report
    trained = time.perf_counter() - began
    peak = resident_peak()
    with tempfile.TemporaryDirectory() as scratch:
        found = evaluate_fleet(spec, Path(scratch))
    evaluated = time.perf_counter() - began - trained
    with Store(store) as kept:
        checked, stats = kept.verify(), kept.stats(largest=0)
    assert checked.ok, checked.faults
    values = {
        "what": "a fleet out of books, trained, stored and evaluated",
        "command": f"python benchmarks/fleet/books.py --work build/books --threads {arguments.threads}",
        "threads": arguments.threads,
        "users": report["users"],
        "rows": report["rows"],
        "gains": {name: value for name, value in report["gains"].items() if name != "base_better"},
        "timing": report["timing"],
        "seconds": {"in_all": trained, "evaluation_out_of_the_store": evaluated},
        "peak_memory_bytes": peak,
        "evaluation": {name: found[name] for name in ("users", "metrics", "part")},
        "store": {"versions": stats.versions, "bytes_checked": checked.bytes},
        "versions": report["versions"],
    }
    values["table"] = table(values)
    print(json.dumps(values["table"], indent=1))
    if arguments.users == parser.get_default("users"):
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def table(values: dict[str, Any]) -> dict[str, Any]:
    users, kept, timing = values["users"], values["gains"]["kept"], values["timing"]
    loss = values["evaluation"]["metrics"]["loss"]
    quantiles = kept["quantiles"]
    rows = [
        ["users", f"{users['all']:,}"],
        ["adapters in the store", f"{users['stored']:,}"],
        ["the base model is better", f"{users['base']:,}"],
        ["loss of the base on test rows, mean over users with adapters", f"{loss['before']:.3f}"],
        ["loss with their adapters, out of the store", f"{loss['after']:.3f}"],
        [
            "gain, median (5 % … 95 %)",
            f"{quantiles['0.5']:.3f} ({quantiles['0.05']:.3f} … {quantiles['0.95']:.3f})",
        ],
        ["adapters that are better on test rows", f"{kept['better']:.1%}"],
        ["minutes of training", f"{timing['seconds'] / 60:.1f}"],
        ["users trained per hour", f"{timing['adapters_per_hour']:,.0f}"],
        ["adapters stored per hour", f"{3600 * users['stored'] / timing['seconds']:,.0f}"],
        [
            "seconds to evaluate all of them out of the store",
            f"{values['seconds']['evaluation_out_of_the_store']:.0f}",
        ],
        [
            "KiB of an adapter in the store",
            f"{values['store']['bytes_checked'] / values['store']['versions'] / 1024:.1f}",
        ],
    ]
    return {
        "columns": ["", "fleet out of books"],
        "rows": rows,
        "note": "The model inside modicum, LoRA-XS of rank 16 on all linear layers; a user is a stretch of a "
        f"book: 10 passages to train on, 3 to judge by, 3 to test. Threads: {values['threads']}.",
    }


if __name__ == "__main__":
    main()

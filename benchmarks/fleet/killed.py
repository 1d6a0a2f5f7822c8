"""The fleet out of books killed in the middle and gone on with: what is in the store, against one never interrupted.

`books.py` has trained that one, in the folder WHOLE, which is only read. Here the same job begins in a folder of its
own. After some cohorts, in the middle of the next one, its processes are ended by SIGKILL; then it is started again.
Every version has to be the same record with the same metrics, tags, aliases, seed, parent and digest of rows. It takes
as long as the fleet, and half a cohort more.

    python benchmarks/fleet/killed.py --work build/killed --whole build/books [--after 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet

from modicum.evaluate.resources import resident_peak
from modicum.fleet.job import train_fleet
from modicum.fleet.ledger import FILE
from modicum.fleet.spec import FleetSpec, load_fleet
from modicum.store import Store
from modicum.store.record import Record, digest, encode

HERE = Path(__file__).parent
RESULT = HERE / "results" / "fleet_killed.json"
FLEET = HERE.parents[1] / "recipes" / "fleet" / "users.yaml"


def spec_in(work: Path, whole: Path) -> FleetSpec:
    """The job of the whole fleet, with its rows and its sizes, whose store and folder are elsewhere."""
    report = report_of(whole)
    sizes = report["sizes"]
    changes = [
        f"users.source='{report['spec']['users']['source']}'",
        f"train.tokens_per_pass={sizes['tokens']}",
        f"train.cohort_size={sizes['users']}",
        f"store.path='{work / 'store'}'",
        f"output='{work / 'run'}'",
    ]
    spec = load_fleet(FLEET, changes)
    if spec.digest() != report["digest"]:
        raise SystemExit(f"{whole} holds the fleet {report['digest']}, {FLEET} is {spec.digest()}")
    return spec


def report_of(whole: Path) -> dict[str, Any]:
    return json.loads((whole / "run" / "report.json").read_text(encoding="utf-8"))


def train(work: Path, whole: Path) -> None:
    """What the other process does: the job, begun or gone on with, and the most memory that took."""
    spec = spec_in(work, whole)
    torch.set_num_threads(report_of(whole)["sizes"]["threads"])
    report = train_fleet(spec, resume=spec.folder.is_dir()).report
    print(json.dumps({"peak_memory_bytes": resident_peak(), "timing": report["timing"]}))


def started(arguments: argparse.Namespace) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        __file__,
        "--work",
        str(arguments.work),
        "--whole",
        str(arguments.whole),
        "--child",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def cohorts(folder: Path) -> int:
    """How many cohorts of a job are on the disk."""
    try:
        with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as ledger:
            return ledger.execute("SELECT count(*) FROM cohorts").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def killed(arguments: argparse.Namespace) -> int:
    """How many cohorts were finished when the job was killed, half a cohort after the last of them."""
    folder, timing = arguments.work / "run", report_of(arguments.whole)["timing"]
    process = started(arguments)
    while cohorts(folder) < arguments.after:
        if process.poll() is not None:
            raise SystemExit("the job ended before it could be killed")
        time.sleep(0.2)
    time.sleep(timing["seconds"] / timing["cohorts"] / 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return cohorts(folder)


def contents(store: Path) -> dict[str, list[Any]]:
    """Everything a store says about its versions but when they came, and the folder in which the base model lay."""
    with tempfile.TemporaryDirectory() as scratch:
        # opening may write
        copy = shutil.copytree(store, Path(scratch) / "store")
        with Store(copy) as opened:
            assert opened.verify().ok
            return {
                str(one): [
                    without_folder(opened.get(str(one))), one.metrics, sorted(one.tags), sorted(one.aliases),
                    one.seed, one.parent, one.data_digest,
                ]
                for one in opened.ls()
            }  # fmt: skip


def without_folder(record: Record) -> str:
    """The digest of a record that does not say where its base model lay."""
    config = {key: value for key, value in record.config.items() if key != "base_model_name_or_path"}
    return digest(encode(dataclasses.replace(record, config=config))).hex()


def states(folder: Path) -> dict[str, Any]:
    rows = parquet.read_table(folder / "users.parquet").to_pylist()
    return {row["user"]: (row["state"], row["version"], row["after"]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a new folder; may be removed after")
    parser.add_argument("--whole", type=Path, required=True, help="the folder that books.py worked in")
    parser.add_argument("--after", type=int, default=3, help="cohorts")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments.work, arguments.whole)
        return
    if arguments.work.exists():
        parser.error(f"{arguments.work} is there already")
    arguments.work.mkdir(parents=True)
    finished = killed(arguments)
    left = contents(arguments.work / "store")
    process = started(arguments)
    told = json.loads(process.communicate()[0])
    assert process.returncode == 0
    found, wanted = contents(arguments.work / "store"), contents(arguments.whole / "store")
    became = states(arguments.work / "run"), states(arguments.whole / "run")
    planned = json.loads((HERE / "results" / "fleet_predicted.json").read_text(encoding="utf-8"))["plan"]
    values = {
        "what": "a fleet killed in the middle and gone on with, against one never interrupted",
        "command": "python benchmarks/fleet/killed.py --work build/killed --whole build/books "
        f"--after {arguments.after}",
        "users": len(became[1]),
        "cohorts": told["timing"]["cohorts"],
        "cohorts_when_killed": finished,
        "versions_when_killed": len(left),
        "versions": len(wanted),
        "versions_equal": sum(found.get(name) == one for name, one in wanted.items()),
        "versions_different": sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))[:20],
        "users_equal": sum(became[0].get(user) == one for user, one in became[1].items()),
        "peak_memory_bytes": told["peak_memory_bytes"],
        "planned_memory_bytes": sum(planned["memory"].values()),
        "versions_of_libraries": report_of(arguments.work)["versions"],
    }
    values["table"] = table(values)
    print(json.dumps(values, indent=1))
    RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if found != wanted:
        raise SystemExit("the stores differ")


def table(values: dict[str, Any]) -> dict[str, Any]:
    rows = [
        ["users", f"{values['users']:,}"],
        ["cohorts finished when it was killed", f"{values['cohorts_when_killed']} of {values['cohorts']}"],
        ["versions in the store then", f"{values['versions_when_killed']:,}"],
        [
            "versions at the end that are those of the fleet never interrupted",
            f"{values['versions_equal']:,} of {values['versions']:,}",
        ],
        ["users of whom the same became", f"{values['users_equal']:,} of {values['users']:,}"],
        ["peak memory of the process, GB", f"{values['peak_memory_bytes'] / 1e9:.2f}"],
        ["planned by `predicted.py`, GB", f"{values['planned_memory_bytes'] / 1e9:.2f}"],
    ]
    return {
        "columns": ["", "killed and gone on with"],
        "rows": rows,
        "note": "SIGKILL in the middle of a cohort. Versions are the same where record (but for the folder of the base "
        "model), metrics, tags, aliases, seed, parent and the digest of the rows are.",
    }


if __name__ == "__main__":
    main()

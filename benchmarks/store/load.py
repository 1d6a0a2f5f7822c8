"""A store of many adapters: how fast it is written and read, what it takes, against folders and plain SQLite blobs.

Records are LoRA-XS adapters (r = 16, bfloat16, q and v of as many layers as the size asks for) with normal random
numbers and real headers, under names of users. All arms run in one process after each other on the same disk.
"Cold": before every single read the kernel was told to forget all files; the store has been open and in use, as in a
server. "First" is stricter: the store is opened anew for every read as well.

    python benchmarks/store/load.py --records 50000 --bytes 10240
    python benchmarks/store/load.py --records 1000000 --bytes 10240 --store FOLDER   # 11 GB, some minutes

A store that `--store` names is kept, and filled up to the number of records first; then some more are added, which is
what the rates of writing are taken from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modicum import __version__
from modicum.store import Store

sys.path.insert(0, str(Path(__file__).parent))
from baselines import peft_folders, sqlite_blobs
from measured import chunks, disk_bytes, fetched, forget_all, machine, percentiles, reader, records, timed

RESULTS = Path(__file__).parent / "results"
#: what the store promises: bytes per byte of a record, and per record
_FACTOR, _EXTRA = 1.03, 200
_OPENING = ("from modicum.store import Store", "store = Store(sys.argv[1]); read = store.get")


def ours(folder: Path, given: argparse.Namespace) -> dict:
    rng = np.random.default_rng(1)
    fill(folder, given)
    with Store(folder) as store:
        result = writing(store, given)
        found = store.stats()
    disk = disk_bytes(folder)
    limit = _FACTOR * found.record_bytes + _EXTRA * found.versions
    result = {
        "records": found.versions,
        "record_bytes": found.record_bytes // found.versions,
        **result,
        "disk_bytes_per_record": round(disk / found.versions, 1),
        "disk_bytes_allowed_per_record": round(limit / found.versions, 1),
    }
    names = users(folder)
    drawn = rng.choice(names, min(given.reads, len(names)), replace=False).tolist()
    result["reader"] = reader(folder, drawn[:1000], *_OPENING)
    result |= reading(folder, drawn, rng, names)
    with Store(folder) as store:
        result["verify_seconds"] = round(timed(lambda: check(store)), 2)
        removed = rng.choice(names, 220, replace=False).tolist()
        result["remove_ms"] = percentiles([timed(lambda n=n: store.remove(n, 1)) for n in removed[:200]], 1e3)
        result["purge_ms"] = percentiles([timed(lambda n=n: store.purge(n)) for n in removed[200:]], 1e3)
        result["ls_100_ms"] = round(1e3 * timed(lambda: store.ls(limit=100)), 2)
        result["stats_seconds"] = round(timed(store.stats), 2)
    return result


def fill(folder: Path, given: argparse.Namespace) -> None:
    """Returns when the store has as many records as wanted; what an earlier run has made counts."""
    with Store(folder, create=True) as store:
        there = store.stats().versions
        for chunk in chunks(max(0, given.records - there), given.bytes, seed=there):
            store.put_many(chunk)
            there += len(chunk)
            print(f"\r{there:,} of {given.records:,}", end="", file=sys.stderr)


def writing(store: Store, given: argparse.Namespace) -> dict:
    """What it takes to add records to what is there already, in batches and one by one."""
    before, seconds = store.stats().entries, 0.0
    for chunk in chunks(given.added, given.bytes, seed=before):
        seconds += timed(lambda chunk=chunk: store.put_many(chunk))
    singles = list(records(given.singles, given.bytes, seed=before + 1))
    single = [timed(lambda one=one: store.put(f"single/{one[0]}", one[1])) for one in singles]
    return {
        "batched_records_per_second": round(given.added / seconds),
        "single_commit_ms": percentiles(single, 1e3),
    }


def check(store: Store) -> None:
    """Returns when every bit was found as it should be."""
    faults = store.verify().faults
    if faults:
        raise SystemExit("\n".join(faults))


def users(folder: Path) -> np.ndarray:
    """The names of everybody who has version 1; `Store.ls` would look up a million descriptions."""
    query = "SELECT n.name FROM names n JOIN versions v ON v.name = n.id WHERE n.name GLOB 'users/*' AND v.version = 1"
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as index:
        return np.array([name for (name,) in index.execute(query)])


def reading(folder: Path, drawn: list[str], rng: np.random.Generator, names: np.ndarray) -> dict:
    def tensor(store: Store, wanted: list[str]) -> float:
        return timed(lambda: store.get_many(wanted).tensor())

    def cold(store: Store, wanted: list[list[str]]) -> tuple[dict, float]:
        """Times, and KiB that each read has fetched from the disk: proof that the kernel had forgotten."""
        times, before = [], fetched()
        for one in wanted:
            forget_all(folder)
            times.append(tensor(store, one))
        return percentiles(times, 1e3), round((fetched() - before) / len(wanted) / 1024, 1)

    def first(wanted: list[str]) -> float:
        forget_all(folder)
        with Store(folder) as store:
            return tensor(store, wanted)

    singly = [[name] for name in drawn]
    together = [rng.choice(names, 64, replace=False).tolist() for _ in range(300)]
    with Store(folder) as store:
        for name in drawn:
            store.get(name)
        warm = [timed(lambda name=name: store.get(name)) for name in drawn]
        alone = [tensor(store, one) for one in singly]
        for some in together[:50]:
            store.get_many(some)
        many = [tensor(store, some) for _ in range(4) for some in together[:50]]
        cold_one, one_kib = cold(store, singly[:2000])
        cold_many, many_kib = cold(store, together[50:])
    return {
        "warm_get_us": percentiles(warm, 1e6),
        "warm_tensor_us": percentiles(alone, 1e6),
        "cold_tensor_ms": cold_one,
        "cold_tensor_kib_from_disk": one_kib,
        "first_tensor_ms": percentiles([first(one) for one in singly[:500]], 1e3),
        "warm_get_many_64_ms": percentiles(many, 1e3),
        "cold_get_many_64_ms": cold_many,
        "cold_get_many_64_kib_from_disk": many_kib,
        "first_get_many_64_ms": percentiles([first(some) for some in together[50:150]], 1e3),
    }


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """The table of the docs: the store beside folders and blobs, and what only the store has to answer for."""
    arms = {name: found for name, found in result.items() if isinstance(found, dict) and "records" in found}

    def spread(name: str, digits: int, scale: float = 1.0) -> list[str]:
        values = [found.get(name) for found in arms.values()]
        return [
            "" if one is None else " / ".join(f"{one[at] * scale:.{digits}f}" for at in ("p50", "p99"))
            for one in values
        ]

    def numbers(name: str, digits: int = 0, section: str | None = None) -> list[str]:
        values = [(found.get(section, {}) if section else found).get(name) for found in arms.values()]
        return ["" if one is None else f"{one:,.{digits}f}" for one in values]

    rows = [
        ["adapters", *numbers("records")],
        ["bytes of one", *numbers("record_bytes")],
        ["written in batches, per second", *numbers("batched_records_per_second")],
        ["one durable commit, ms", *spread("single_commit_ms", 1)],
        ["bytes on disk, each", *numbers("disk_bytes_per_record")],
        ["read as tensor, cold, ms", *spread("cold_tensor_ms", 2)],
        ["fetched from the disk for it, KiB", *numbers("cold_tensor_kib_from_disk")],
        ["cold, the first of a new reader, ms", *spread("first_tensor_ms", 2)],
        ["read as tensor, warm, ms", *spread("warm_tensor_us", 3, 1e-3)],
        ["64 as one tensor, cold, ms", *spread("cold_get_many_64_ms", 1)],
        ["64 as one tensor, warm, ms", *spread("warm_get_many_64_ms", 1)],
        ["opening, ms", *numbers("open_ms", 1, "reader")],
        ["opening and the first read, ms", *numbers("open_and_first_get_ms", 1, "reader")],
        ["memory of a reader, MiB", *numbers("resident_mib", 0, "reader")],
        ["of that before opening, MiB", *numbers("resident_before_opening_mib", 0, "reader")],
        ["verify all, s", *numbers("verify_seconds")],
        ["purge of one, ms", *spread("purge_ms", 0)],
    ]
    note = (
        "Two numbers are median and 99th percentile. Cold: the system was told to forget all files before each read, "
        "while the reader has been open and in use (folders: the two files; their names stay known to the system). "
        "Folders hold one safetensors file and one configuration each, as PEFT saves them, which waits for no disk: "
        "only for the durable commit of one are files and folders flushed. Store and blobs flush every commit. Blobs "
        "are bytes by name; nothing checks or decodes them. Opening is that of files nobody has in memory; a reader of "
        "folders has loaded PyTorch. What is empty was not measured. "
        f"{result['machine']['cores']} cores, {result['machine']['memory_gib']:.0f} GiB. Made by `{result['command']}`."
    )
    return {"columns": ["", *arms], "rows": rows, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--bytes", type=int, default=10_240)
    parser.add_argument("--added", type=int, default=20_000, help="records put in batches behind the others")
    parser.add_argument("--singles", type=int, default=500, help="records put with a commit each")
    parser.add_argument("--store", type=Path, help="the store to use and to keep, filled up if need be")
    parser.add_argument("--reads", type=int, default=5000)
    parser.add_argument("--baseline", type=int, default=50_000, help="records of the arms beside the store")
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder otherwise")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(),
        "what": f"{given.records} adapters of about {given.bytes} bytes",
        "command": f"python benchmarks/store/load.py --records {given.records} --bytes {given.bytes}"
        + "".join(
            f" --{name} {value}"
            for name in ("added", "singles", "reads", "baseline")
            if (value := getattr(given, name)) != parser.get_default(name)
        ),
        "versions": {"modicum": __version__, "torch": torch.__version__, "sqlite": sqlite3.sqlite_version},
    }
    arms = {"store": ours, "folders of safetensors": peft_folders, "SQLite blobs": sqlite_blobs}
    for name, arm in arms.items():
        with contextlib.ExitStack() as stack:
            if arm is ours and given.store is not None:
                folder = given.store
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder)))
            result[name] = arm(folder, given)
    result = {"table": shown(result), **result}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"load-{given.records}-{given.bytes}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

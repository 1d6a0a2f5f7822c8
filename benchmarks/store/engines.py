"""Which embedded engine the adapter store is built on: segment files with a SQLite index, or SQLite alone.

Both keep (name → bytes) durably (WAL, synchronous=FULL, fdatasync of the segment before the commit) and take turns
in one run, so the ratios are worth more than the numbers. "Cold" means: the kernel was told to forget the files of
the store, and the connection is new.

    python benchmarks/store/engines.py [--records 20000] [--bytes 10240] [--folder FOLDER]
"""

# ruff: noqa: D102 - two small classes that do the same

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from measured import forget, percentiles

RESULTS = Path(__file__).parent / "results"
BATCH = 500


class Engine(Protocol):
    """What is measured."""

    def __init__(self, folder: Path) -> None: ...
    def write(self, items: list[tuple[str, bytes]]) -> None: ...
    def read(self, name: str) -> bytes: ...
    def close(self) -> None: ...


def connect(file: Path, page: int) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None)
    for pragma in (f"page_size={page}", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


class Segments:
    """Payload appended to a file, its place in SQLite."""

    def __init__(self, folder: Path) -> None:
        self.db = connect(folder / "index.sqlite", 4096)
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS places(name TEXT PRIMARY KEY, start INT, size INT) WITHOUT ROWID"
        )
        self.file = os.open(folder / "segment", os.O_RDWR | os.O_CREAT, 0o600)
        self.end = os.fstat(self.file).st_size

    def write(self, items: list[tuple[str, bytes]]) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        os.pwrite(self.file, b"".join(data for _, data in items), self.end)
        os.fdatasync(self.file)
        rows = []
        for name, data in items:
            rows.append((name, self.end, len(data)))
            self.end += len(data)
        self.db.executemany("INSERT INTO places VALUES (?, ?, ?)", rows)
        self.db.execute("COMMIT")

    def read(self, name: str) -> bytes:
        start, size = self.db.execute("SELECT start, size FROM places WHERE name = ?", (name,)).fetchone()
        return os.pread(self.file, size, start)

    def close(self) -> None:
        self.db.close()
        os.close(self.file)


class Blobs:
    """Payload in the pages of SQLite, 16 KiB each."""

    def __init__(self, folder: Path) -> None:
        self.db = connect(folder / "blobs.sqlite", 16384)
        self.db.execute("CREATE TABLE IF NOT EXISTS names(name TEXT PRIMARY KEY, object INT) WITHOUT ROWID")
        self.db.execute("CREATE TABLE IF NOT EXISTS objects(id INTEGER PRIMARY KEY, data BLOB)")

    def write(self, items: list[tuple[str, bytes]]) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        for name, data in items:
            row = self.db.execute("INSERT INTO objects(data) VALUES (?)", (data,)).lastrowid
            self.db.execute("INSERT INTO names VALUES (?, ?)", (name, row))
        self.db.execute("COMMIT")

    def read(self, name: str) -> bytes:
        query = "SELECT data FROM names JOIN objects ON objects.id = names.object WHERE name = ?"
        return self.db.execute(query, (name,)).fetchone()[0]

    def close(self) -> None:
        self.db.close()


def measure(kind: type[Engine], folder: Path, records: int, size: int) -> dict:
    rng = np.random.default_rng(0)
    names = [rng.bytes(16).hex() for _ in range(records)]
    engine, seconds = kind(folder), 0.0
    for at in range(0, records, BATCH):
        batch = [(name, rng.bytes(size)) for name in names[at : at + BATCH]]
        start = time.perf_counter()
        engine.write(batch)
        seconds += time.perf_counter() - start
    single = []
    for index in range(100):
        batch = [(f"single-{index}", rng.bytes(size))]
        start = time.perf_counter()
        engine.write(batch)
        single.append(time.perf_counter() - start)
    engine.close()
    disk = sum(file.stat().st_size for file in folder.iterdir())
    drawn = rng.choice(names, 4000)
    for file in folder.iterdir():
        forget(file)
    engine = kind(folder)
    cold, warm = reads(engine, drawn[:1000]), (reads(engine, drawn), reads(engine, drawn))[1]
    engine.close()
    return {
        "batched_records_per_second": records / seconds,
        "single_commit_ms": percentiles(single, 1e3),
        "overhead_percent": 100 * (disk / ((records + 100) * size) - 1),
        "cold_read_us": percentiles(cold, 1e6),
        "warm_read_us": percentiles(warm, 1e6),
    }


def reads(engine: Engine, names: np.ndarray) -> list[float]:
    times = []
    for name in names.tolist():
        start = time.perf_counter()
        engine.read(name)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=10_240)
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder otherwise")
    given = parser.parse_args()
    found = {}
    with contextlib.ExitStack() as stack:
        for name, kind in {"segments + SQLite": Segments, "SQLite, 16 KiB pages": Blobs}.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.folder)))
            found[name] = measure(kind, folder, given.records, given.bytes)
    result = {
        "what": f"{given.records} records of {given.bytes} bytes, commits of {BATCH}",
        "command": f"python benchmarks/store/engines.py --records {given.records} --bytes {given.bytes}",
        "sqlite": sqlite3.sqlite_version,
        "engines": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"engines-{given.bytes}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What the store is measured against: PEFT's folders, and a plain table of blobs in SQLite."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from modicum.store.atomic import flush
from modicum.store.record import Record, encode

sys.path.insert(0, str(Path(__file__).parent))
from measured import RANK, chunks, disk_bytes, forget_all, percentiles, reader, records, timed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

#: imports and opening of a reader; see `reader`
_FOLDERS = (
    "from safetensors.torch import load_file",
    """
def read(name):
    json.load(open(f"{sys.argv[1]}/{name}/adapter_config.json"))
    return load_file(f"{sys.argv[1]}/{name}/adapter_model.safetensors")
""",
)
_BLOBS = (
    "import sqlite3",
    """
db = sqlite3.connect(f"{sys.argv[1]}/blobs.sqlite")
def read(name):
    return db.execute("SELECT data FROM adapters WHERE name = ?", (name,)).fetchone()[0]
""",
)


def peft_folders(folder: Path, given: argparse.Namespace) -> dict:
    """One folder with `adapter_model.safetensors` and `adapter_config.json` per adapter, as PEFT saves them.

    That does not wait for the disk; where one adapter is committed durably, its files and folders are flushed.
    """
    seconds, names, payload = 0.0, [], 0
    config = json.dumps({"peft_type": "LORA", "r": RANK, "target_modules": ["q_proj", "v_proj"]}, indent=2)

    def state_of(record: Record) -> dict:
        return {f"base_model.model.{n}": torch.from_numpy(v).bfloat16() for n, v in record.tensors()}

    def save(name: str, state: dict) -> None:
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "adapter_model.safetensors")
        (folder / name / "adapter_config.json").write_text(config)

    def commit(name: str, record: Record) -> None:
        save(name, state_of(record))
        for path in (*(folder / name).iterdir(), folder / name, (folder / name).parent):
            flush(path)

    for chunk in chunks(given.baseline, given.bytes):
        states = [(name, state_of(record)) for name, record in chunk]

        def write(states: list = states) -> None:
            for name, state in states:
                save(name, state)

        seconds += timed(write)
        names += [name for name, _ in chunk]
        payload += sum(len(encode(chunk[0][1])) for _ in chunk)

    def read(name: str) -> object:
        json.loads((folder / name / "adapter_config.json").read_text())
        return load_file(folder / name / "adapter_model.safetensors")

    result = baseline(folder, given, names, payload, seconds, read, lambda name: folder / name)
    return result | beside(folder, given, names, commit, _FOLDERS)


def sqlite_blobs(folder: Path, given: argparse.Namespace) -> dict:
    """One table of names and blobs, default pages, WAL, durable, commits as large as the store's."""
    db = sqlite3.connect(folder / "blobs.sqlite", isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        db.execute(f"PRAGMA {pragma}").fetchall()
    db.execute("CREATE TABLE adapters(name TEXT PRIMARY KEY, data BLOB)")
    insert = "INSERT INTO adapters VALUES (?, ?)"
    seconds, names, payload = 0.0, [], 0
    for chunk in chunks(given.baseline, given.bytes):

        def write(chunk: list = chunk) -> None:
            for at in range(0, len(chunk), 2000):
                db.execute("BEGIN")
                rows = ((name, encode(record)) for name, record in chunk[at : at + 2000])
                db.executemany(insert, rows)
                db.execute("COMMIT")

        seconds += timed(write)
        names += [name for name, _ in chunk]
        payload += len(encode(chunk[0][1])) * len(chunk)

    def read(name: str) -> object:
        data = db.execute("SELECT data FROM adapters WHERE name = ?", (name,)).fetchone()[0]
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    result = baseline(folder, given, names, payload, seconds, read, lambda _: folder)
    result |= beside(
        folder, given, names, lambda name, record: db.execute(insert, (name, encode(record))), _BLOBS
    )
    db.close()
    return result


def baseline(
    folder: Path,
    given: argparse.Namespace,
    names: list[str],
    payload: int,
    seconds: float,
    read: Callable[[str], object],
    kept_in: Callable[[str], Path],
) -> dict:
    """What reading takes; `kept_in`: the folder that an adapter is read from."""
    drawn = np.random.default_rng(1).choice(names, min(given.reads, 2000, len(names)), replace=False).tolist()
    os.sync()
    cold = []
    for name in drawn:
        forget_all(kept_in(name))
        cold.append(timed(lambda name=name: read(name)))
    for name in drawn:
        read(name)
    return {
        "records": len(names),
        "record_bytes": payload // len(names),
        "batched_records_per_second": round(len(names) / seconds),
        "disk_bytes_per_record": round(disk_bytes(folder) / len(names), 1),
        "cold_tensor_ms": percentiles(cold, 1e3),
        "warm_tensor_us": percentiles([timed(lambda name=name: read(name)) for name in drawn], 1e6),
    }


def beside(
    folder: Path,
    given: argparse.Namespace,
    names: list[str],
    commit: Callable[[str, Record], object],
    opening: tuple[str, str],
) -> dict:
    """What opening takes, and one durable commit each, which adds records that are counted nowhere else."""
    drawn = np.random.default_rng(2).choice(names, min(1000, len(names)), replace=False).tolist()
    found = reader(folder, drawn, *opening)
    singles = list(records(given.singles, given.bytes, seed=1))
    return {
        "reader": found,
        "single_commit_ms": percentiles([timed(lambda one=one: commit(*one)) for one in singles], 1e3),
    }

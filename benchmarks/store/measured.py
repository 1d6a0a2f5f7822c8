"""What the benchmarks of the store share: adapters, percentiles, forgetting what the kernel has cached, and readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.store.record import Record, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RANK = 16
#: records made at a time, so that making them does not count as writing them
_CHUNK = 10_000
_READER = """
import json, sys, time
{imports}
names = json.load(sys.stdin)
def resident():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
before = resident()
start = time.perf_counter()
{opening}
opened = time.perf_counter() - start
read(names[0])
first = time.perf_counter() - start
for name in names:
    read(name)
print(json.dumps({{"open_ms": 1e3 * opened, "open_and_first_get_ms": 1e3 * first, "resident_mib": resident(),
                  "resident_before_opening_mib": before}}))
"""


def records(count: int, size: int, seed: int = 0) -> Iterator[tuple[str, Record]]:
    """(name, record) of `count` users; a record takes about `size` bytes."""
    rng = np.random.default_rng(seed)
    tensors = max(1, round((size - 550) / (2 * RANK**2)))
    names = [f"model.layers.{n // 2}.self_attn.{'qv'[n % 2]}_proj.R" for n in range(tensors)]
    about: dict[str, Any] = {
        "config": {"r": RANK, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"]},
        "task_type": "CAUSAL_LM",
        "base_fingerprint": "5f" * 32,
        "basis_fingerprint": rng.normal(size=16).round(5).tolist(),
        "recipe_digest": "blake2b:" + "a1" * 32,
    }
    for _ in range(count):
        values = rng.standard_normal((tensors, RANK, RANK), np.float32)
        yield (
            f"users/{uuid.UUID(bytes=rng.bytes(16))}",
            build("lora_xs", dict(zip(names, values, strict=True)), **about),
        )


def chunks(count: int, size: int, seed: int = 0) -> Iterator[list[tuple[str, Record]]]:
    made = records(count, size, seed)
    for at in range(0, count, _CHUNK):
        yield [next(made) for _ in range(min(_CHUNK, count - at))]


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def disk_bytes(folder: Path) -> int:
    """What the files under `folder` take on the disk, in whole blocks."""
    return sum(512 * path.lstat().st_blocks for path in folder.rglob("*"))


def forget_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            forget(path)


def machine() -> dict[str, Any]:
    """What the numbers depend on: cores, memory, and how busy they are already."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 1),
    }


def percentiles(seconds: Sequence[float], unit: float) -> dict[str, float]:
    """p50, p99 and the largest of `seconds`, times `unit`."""
    p50, p99 = np.percentile(seconds, [50, 99]) * unit
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(max(seconds) * unit, 3)}


def forget(file: Path) -> None:
    """Returns when the kernel was told to drop its cached pages of `file`, which nobody may have mapped."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def fetched() -> int:
    """Bytes that this process has made the system fetch from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def reader(folder: Path, names: list[str], imports: str, opening: str) -> dict:
    """Opening and memory, in processes that do nothing else; `opening` defines `read`, for the folder `sys.argv[1]`."""
    found = []
    for _ in range(5):
        forget_all(folder)
        command = [sys.executable, "-c", _READER.format(imports=imports, opening=opening), str(folder)]
        done = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return {key: round(max(one[key] for one in found), 2) for key in found[0]}

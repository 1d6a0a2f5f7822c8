"""What the benchmarks of the store share: percentiles, and forgetting what the kernel has cached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence


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

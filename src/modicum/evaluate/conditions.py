"""Under which conditions a time was measured: machine, threads, versions, and how busy the machine was."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The machine and the software on it."""

    processor: str
    #: cores that this process may use
    cores: int
    device: str
    threads: int
    #: processes that ran or waited to run, averaged over the last minute, before and after; None where unknown
    load_before: float | None
    load_after: float | None
    system: str
    python: str
    torch: str
    transformers: str
    modicum: str


def machine(device: str, threads: int, load_before: float | None) -> Machine:
    """The machine as it is now, with the load of now as the one after the measurement."""
    import torch
    import transformers

    from modicum._version import __version__

    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return Machine(
        processor=_processor(),
        cores=cores(),
        device=device,
        threads=threads,
        load_before=load_before,
        load_after=load(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        modicum=__version__,
    )


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """The load average of the last minute, None where the system keeps none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

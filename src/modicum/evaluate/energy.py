"""Energy that a stretch of a program took: processor packages from RAPL, GPUs from NVML, null with a reason where not.

Both are counters of the hardware, so they hold what every other program on the same processor or GPU took as well.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Collection

POWERCAP = Path("/sys/class/powercap")
#: seconds between two looks at the counters of the processor; at 1 kW the smallest of them (65 kJ) is full after 65
_EVERY = 30.0


@final
class Energy:
    """Joules since this was made, of the processor packages of this machine and of GPUs.

    `root`: the folder of the powercap tree. Without `processor` the packages are left to another process of the
    same machine, which counts them.
    """

    def __init__(self, root: Path = POWERCAP, *, processor: bool = True) -> None:
        self._rapl = Rapl(root) if processor else None
        self._gpus, self._no_gpus = _gpu_joules()
        self._stopped = threading.Event()
        if self._rapl is not None and self._rapl.fault is None:
            # a counter that runs over twice between two looks would be short by one round
            threading.Thread(target=self._watch, args=(self._rapl,), daemon=True).start()

    def read(self, gpus: Collection[str]) -> tuple[float | None, str | None, str | None]:
        """Joules so far, where they were read (`rapl`, `nvml`, `rapl+nvml`), and why something is missing.

        `gpus`: the UUIDs of those that were used. Joules are None where nothing could be read.
        """
        parts: dict[str, float] = {}
        faults: list[str] = []
        if self._rapl is not None:
            joules = self._rapl.joules()
            if joules is None:
                faults.append(f"processor: {self._rapl.fault}")
            else:
                parts["rapl"] = joules
        if gpus:
            now, fault = _gpu_joules()
            missing = [gpu for gpu in gpus if gpu not in now or gpu not in self._gpus]
            if missing:
                faults.append(
                    f"GPU: {fault or self._no_gpus or 'no energy counter of ' + ', '.join(missing)}"
                )
            else:
                parts["nvml"] = sum(now[gpu] - self._gpus[gpu] for gpu in gpus)
        total = sum(parts.values()) if parts else None
        return total, "+".join(parts) or None, "; ".join(faults) or None

    def stop(self) -> None:
        """Look at the counters no more by itself."""
        self._stopped.set()

    def _watch(self, rapl: Rapl) -> None:
        while not self._stopped.wait(_EVERY):
            rapl.joules()


@final
class Rapl:
    """The energy counters of all processor packages below `root`, a powercap tree as Linux has it.

    `fault` says why they cannot be read, None where they can: all of them, for some alone would say too little.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self.fault: str | None = None
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last: dict[Path, int] = {}
        zones = _packages(root)
        if not zones:
            self.fault = f"no RAPL package in {root}"
        for zone in zones:
            value = self._value(zone / "energy_uj")
            if value is not None:
                self._last[zone] = value

    def joules(self) -> float | None:
        """Joules of all packages since this was made; None where a counter cannot be read."""
        with self._lock:
            for zone, last in self._last.items():
                if self.fault is not None:
                    break
                now = self._value(zone / "energy_uj")
                # the counter starts again at 0 after its largest value
                round_ = self._value(zone / "max_energy_range_uj") if now is not None and now < last else 0
                if now is None or round_ is None:
                    break
                self._joules += (now - last + round_) / 1e6
                self._last[zone] = now
            return self._joules if self.fault is None else None

    def _value(self, file: Path) -> int | None:
        try:
            return int(file.read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds no number"
            self.fault = f"cannot read {file}: {reason}"
            return None


def _packages(root: Path) -> list[Path]:
    """The zones of whole packages, each once; some machines show one through two interfaces."""
    found: dict[str, Path] = {}
    for zone in sorted(root.glob("intel-rapl*:*"), key=lambda zone: ("mmio" in zone.name, zone.name)):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if name.startswith("package"):
            found.setdefault(name, zone)
    return list(found.values())


def _gpu_joules() -> tuple[dict[str, float], str | None]:
    """Joules of every NVIDIA GPU since its driver was loaded, by UUID; and why there are none."""
    try:
        import pynvml
    except ImportError:
        return {}, "nvidia-ml-py is not installed: pip install modicum[tracking]"
    nvml: Any = pynvml
    found: dict[str, float] = {}
    fault = None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {}, str(error)
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid, millijoules = (
                    nvml.nvmlDeviceGetUUID(handle),
                    nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
                )
            except nvml.NVMLError as error:
                fault = str(error)
                continue
            found[uuid] = millijoules / 1000
    finally:
        nvml.nvmlShutdown()
    return found, fault

"""What a stretch of a program took: time, processor and GPU seconds, peak memory, energy; and what that costs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import psutil

from modicum.errors import ConfigError, ModicumError, did_you_mean
from modicum.evaluate.energy import POWERCAP, Energy
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_HOUR = 3600.0
_JOULES_PER_KWH = 3.6e6
#: what of a peak that belongs to this stretch alone, and of one since the process began
RUN, PROCESS = "run", "process"
#: seconds between two writes of a `ResourceFile`
_NOTE_EVERY = 20.0


@final
class Resources:
    """Within a `with` block, what this process and its children took; `as_dict()` at any time, and after it.

    Blocks may lie in one another. `powercap` and `processor`: see `Energy`.
    """

    def __init__(self, *, powercap: Path = POWERCAP, processor: bool = True) -> None:
        self._powercap, self._processor = powercap, processor
        self._final: dict[str, Any] | None = None
        self._resident: int | None = None
        self._gpu_peaks: dict[int, int] = {}

    def __enter__(self) -> Self:
        self._scope = RUN if reset_peaks() else PROCESS
        _OPEN.append(self)
        self._energy = Energy(self._powercap, processor=self._processor)
        self._cpu, self._began = _cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._final = self.as_dict()
        self._energy.stop()
        _OPEN.remove(self)

    def as_dict(self) -> dict[str, Any]:
        """What was taken so far, in plain values for JSON.

        `seconds`: on the clock; `cpu_seconds`: user and system time of this process and its children; `gpu_seconds`:
        `seconds` × the GPUs that held tensors, None without one; `peak_memory_bytes`: most resident memory of this
        process, in this stretch or (`peak_memory_scope`) since the process began, where the system cannot tell;
        `peak_gpu_memory_bytes`: most bytes of tensors on one GPU; `energy_joules` with `energy_source` and
        `energy_note`, which says what could not be read (see `Energy`).
        """
        if self._final is not None:
            return dict(self._final)
        seconds, cpu = time.perf_counter() - self._began, _cpu_seconds() - self._cpu
        self.note_peaks()
        gpus = self._gpu_peaks
        joules, source, note = self._energy.read([_uuid(index) for index in gpus])
        return {
            "seconds": seconds,
            "cpu_seconds": max(0.0, cpu),
            "gpu_seconds": seconds * len(gpus) if gpus else None,
            "peak_memory_bytes": self._resident,
            "peak_memory_scope": self._scope,
            "peak_gpu_memory_bytes": max(gpus.values(), default=None),
            "energy_joules": joules,
            "energy_source": source,
            "energy_note": note,
        }

    def note_peaks(self) -> None:
        """Keep the peaks so far: whoever sets the system's counters back calls this first (`reset_peaks`)."""
        now = resident_peak()
        self._resident = now if self._resident is None else max(self._resident, now or 0)
        for index, peak in _gpu_peaks().items():
            self._gpu_peaks[index] = max(self._gpu_peaks.get(index, 0), peak)


@final
class ResourceFile:
    """Within a `with` block, what work takes that may be interrupted and go on: every attempt is kept in a file.

    `path`: the file, JSON with one entry of `Resources.as_dict` per attempt under `attempts`, and their `total`.
    `processor`: see `Energy`.
    """

    def __init__(self, path: Path, *, processor: bool = True) -> None:
        self._path = path
        self._used = Resources(processor=processor)
        self._before: list[dict[str, Any]] = []
        self._noted = 0.0

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._before = json.loads(self._path.read_text(encoding="utf-8"))["attempts"]
        self._used.__enter__()
        self._noted = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self._used.__exit__(*error)
        if isinstance(error[1], ModicumError) and not self._path.exists():
            return  # what is refused leaves nothing behind
        # where the disk is full, that is the error to tell
        with contextlib.suppress(OSError) if error[0] is not None else contextlib.nullcontext():
            self.note()

    def total(self) -> dict[str, Any]:
        """What all attempts took so far."""
        return total([*self._before, self._used.as_dict()])

    def note(self) -> None:
        """Write the file as of now."""
        attempts = [*self._before, self._used.as_dict()]
        text = json.dumps({"attempts": attempts, "total": total(attempts)}, indent=1)
        write_text(self._path, text + "\n")
        self._noted = time.monotonic()

    def note_now_and_then(self) -> None:
        """Write the file if it is some time old: what a process that is killed took since is not counted."""
        if time.monotonic() - self._noted >= _NOTE_EVERY:
            self.note()


#: blocks that are being measured; the peaks of the system are the process's, and setting them back meets all of them
_OPEN: list[Resources] = []


def reset_peaks() -> bool:
    """Set the peaks of resident and GPU memory back to what is held now; False where the resident one cannot be.

    Blocks of `Resources` that are open keep theirs.
    """
    for one in _OPEN:
        one.note_peaks()
    for index in _gpu_peaks():
        sys.modules["torch"].cuda.reset_peak_memory_stats(index)
    try:
        # Linux: 5 sets the peak back, see proc(5)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_peak() -> int | None:
    """Most bytes that this process held in memory, since it began or since `reset_peaks`; None where unknown."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; its ru_maxrss would also hold the peak of the process that started this one
        return 1024 * int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def total(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The resources of stretches one after the other: sums, and the largest of the peaks.

    Energy is None where that of one part is: a sum of the others would say too little.
    """
    return {"seconds": math.fsum(part["seconds"] for part in parts), **_combined(parts, max)}


def together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The resources of processes that ran at the same time, as one run: the longest time, sums of all else.

    Resident memory is the sum of the peaks, which is at least the peak of the sum; GPU memory is that of the fullest.
    Only one process of a machine may have counted the energy of its processor.
    """
    return {"seconds": max(part["seconds"] for part in parts), **_combined(parts, sum)}


def _combined(parts: Sequence[Mapping[str, Any]], memory: Any) -> dict[str, Any]:
    def known(name: str) -> list[Any]:
        return [part[name] for part in parts if part[name] is not None]

    gpu, resident, on_gpu = known("gpu_seconds"), known("peak_memory_bytes"), known("peak_gpu_memory_bytes")
    # a process that leaves the processor to another one, and holds no GPU, has neither energy nor a reason
    asked = [part for part in parts if part["energy_joules"] is not None or part["energy_note"]]
    energy = [part["energy_joules"] for part in asked if part["energy_joules"] is not None]
    complete = len(energy) == len(asked) > 0
    sources = {name for part in asked for name in (part["energy_source"] or "").split("+") if name}
    notes = list(dict.fromkeys(part["energy_note"] for part in asked if part["energy_note"]))
    if energy and not complete:
        notes.insert(0, f"known of {len(energy)} parts of {len(asked)}")
    return {
        "cpu_seconds": math.fsum(part["cpu_seconds"] for part in parts),
        "gpu_seconds": math.fsum(gpu) if gpu else None,
        "peak_memory_bytes": memory(resident) if resident else None,
        "peak_memory_scope": PROCESS if PROCESS in known("peak_memory_scope") else RUN,
        "peak_gpu_memory_bytes": max(on_gpu, default=None),
        "energy_joules": math.fsum(energy) if complete else None,
        "energy_source": "+".join(sorted(sources, reverse=True)) or None if complete else None,
        "energy_note": "; ".join(notes) or None,
    }


@dataclass(frozen=True)
class Prices:
    """What things cost, in `currency`; None for what is free or not to be counted."""

    #: one hour of one processor core in use
    cpu_hour: float | None = None
    #: one hour of one GPU
    gpu_hour: float | None = None
    #: storing 10⁹ bytes for a month
    gb_month: float | None = None
    #: one kilowatt hour
    kwh: float | None = None
    currency: str = ""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in PRICES}
        faults = [
            f"{name} = {value!r}, must be a number of at least 0"
            for name, value in values.items()
            if value is not None and not _is_price(value)
        ]
        if not isinstance(self.currency, str) or not self.currency.strip():
            faults.append("a price needs its currency: set currency, for example to EUR")
        if faults:
            raise ConfigError(f"the prices cannot be used: {'; '.join(faults)}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Prices:
        """The prices in a section of a YAML file.

        Raises:
            ConfigError: everything that is wrong with it, with the nearest right names.
        """
        known = [one.name for one in fields(cls)]
        wrong = [f"{key!r}{did_you_mean(str(key), known)}" for key in values if key not in known]
        if wrong:
            raise ConfigError(f"prices have no {', '.join(wrong)}; known: {', '.join(known)}")
        return cls(**values)


#: the names of the prices
PRICES = ("cpu_hour", "gpu_hour", "gb_month", "kwh")


def cost(
    resources: Mapping[str, Any] | None, stored_bytes: int | None, prices: Prices, months: float = 1.0
) -> dict[str, Any]:
    """What `resources` (see `Resources.as_dict`) and `months` of storing `stored_bytes` cost: `amount`, `currency`.

    `parts` are the summands, in the currency: `cpu` = cpu_seconds / 3600 × cpu_hour, `gpu` = gpu_seconds / 3600 ×
    gpu_hour (0 without a GPU), `energy` = energy_joules / 3.6e6 × kwh, `storage` = stored_bytes / 1e9 × months ×
    gb_month; None where no price is given, or nothing was measured: those are in `missing`, with the reason.
    """
    used: Mapping[str, Any] = resources or {}
    joules = used.get("energy_joules")
    amounts = {
        "cpu": (prices.cpu_hour, _per(used.get("cpu_seconds"), _HOUR)),
        "gpu": (prices.gpu_hour, (used.get("gpu_seconds") or 0.0) / _HOUR if resources else None),
        "energy": (prices.kwh, _per(joules, _JOULES_PER_KWH)),
        "storage": (prices.gb_month, None if stored_bytes is None else stored_bytes / 1e9 * months),
    }
    parts = {
        name: None if price is None or amount is None else price * amount
        for name, (price, amount) in amounts.items()
    }
    reasons = {"energy": used.get("energy_note")}
    missing = {
        name: reasons.get(name) or "not measured"
        for name, (price, amount) in amounts.items()
        if price is not None and amount is None
    }
    return {
        "amount": math.fsum(part for part in parts.values() if part is not None),
        "currency": prices.currency,
        "parts": parts,
        "missing": missing,
    }


def total_cost(costs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what `cost` gave, part by part.

    Raises:
        ConfigError: they are in different currencies, or there are none.
    """
    all_costs = list(costs)
    currencies = sorted({one["currency"] for one in all_costs})
    if len(currencies) != 1:
        raise ConfigError(f"one sum needs one currency, these costs have {', '.join(currencies) or 'none'}")
    parts = {}
    for name in ("cpu", "gpu", "energy", "storage"):
        known = [one["parts"][name] for one in all_costs if one["parts"][name] is not None]
        parts[name] = math.fsum(known) if known else None
    return {
        "amount": math.fsum(one["amount"] for one in all_costs),
        "currency": currencies[0],
        "parts": parts,
        "missing": {name: reason for one in all_costs for name, reason in one["missing"].items()},
    }


def _per(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _is_price(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _cpu_seconds() -> float:
    """Processor seconds of this process, the children that ended, and those (and theirs) that still run."""
    seconds = math.fsum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        # it may end meanwhile
        with contextlib.suppress(psutil.Error):
            spent = child.cpu_times()
            own_children = (getattr(spent, "children_user", 0.0), getattr(spent, "children_system", 0.0))
            seconds += spent.user + spent.system + sum(own_children)
    return seconds


def _gpu_peaks() -> dict[int, int]:
    """The most bytes of tensors on every GPU that this process holds or held any on; without touching CUDA."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    peaks = {index: torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
    return {index: peak for index, peak in peaks.items() if peak}


def _uuid(index: int) -> str:
    """The name under which NVML knows a GPU, whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{sys.modules['torch'].cuda.get_device_properties(index).uuid}"

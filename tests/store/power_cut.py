"""What the power going off can leave on a disk, at any moment of a store's life, put together from a trace.

    python power_cut.py FOLDER CHANGES CUTS SEED

A worker changes a store under `strace`. A disk that loses its power keeps what was flushed, and of what was written
since then any part: whole writes, single pages of them, or nothing, in any order. For many moments one such disk is
made from the trace; the store on it must be what was acknowledged by then, or that and the change under way.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.store import crash_harness as harness

from modicum.store import Store

_CALLS = "openat,pwrite64,write,ftruncate,truncate,fsync,fdatasync,unlink,unlinkat,rename"
_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+)")
_PAGE = 4096


@dataclass
class File:
    """A file on the disk: what is safe, and what has happened to it since."""

    safe: bytes | None = None
    since: list[tuple] = field(default_factory=list)

    def flush(self) -> None:
        self.safe, self.since = self.after(random.Random(0), 1.0), []

    def after(self, rng: random.Random, share: float) -> bytes | None:
        """What is there if about `share` of what is not safe was written."""
        content = None if self.safe is None else bytearray(self.safe)
        for kind, *about in self.since:
            if kind in ("create", "unlink"):
                # names change in their order, so nothing that comes after a lost one can be there
                if rng.random() >= share:
                    break
                content = bytearray() if kind == "create" else None
            elif content is not None and kind == "cut":
                if rng.random() < share:
                    content[about[0] :] = bytes(max(0, about[0] - len(content)))
            elif content is not None:
                for at, part in _pages(*about):
                    if rng.random() < share:
                        content += bytes(max(0, at - len(content)))
                        content[at : at + len(part)] = part
        return None if content is None else bytes(content)


def _pages(at: int, data: bytes) -> list[tuple[int, bytes]]:
    cuts = [at, *range((at // _PAGE + 1) * _PAGE, at + len(data), _PAGE), at + len(data)]
    return [(a, data[a - at : b - at]) for a, b in itertools.pairwise(cuts)]


def traced(folder: Path, changes: int, seed: int) -> list[tuple]:
    """(what, path, …) of everything that a worker did to the files of the store, and what it said."""
    log = folder.with_name("trace")
    code = f"import sys; sys.path.insert(0, {sys.path[0]!r}); from tests.store.crash_harness import *; "
    code += f"work(Path({str(folder)!r}), 1, {seed}, {{}}, {changes})"
    command = ["strace", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={_CALLS}", "-o", log]
    done = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: list[tuple] = []
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        if match and int(match[3]) >= 0:
            found += _event(match[1], match[2], folder)
    return found


def _event(call: str, text: str, folder: Path) -> list[tuple]:
    texts = [bytes.fromhex(part.replace("\\x", "")) for part in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', text)]
    if call == "write" and text.startswith("1<"):
        return [("said", line) for line in texts[0].decode().splitlines()]
    on = re.match(r"-?\w+<((?:\\x[0-9a-f]{2})*|[^>]*)>(?:\(deleted\))?", text)
    if call in ("unlink", "truncate", "rename"):
        path = texts[0].decode()
    elif call in ("openat", "unlinkat"):
        path = texts[-1].decode()
    else:
        raw = on[1] if on else ""
        path = bytes.fromhex(raw.replace("\\x", "")).decode() if raw.startswith("\\x") else raw
    if not path.startswith(str(folder)) or path.endswith("-shm"):
        return []
    name = str(Path(path).relative_to(folder))
    numbers = [int(n) for n in re.findall(r", (\d+)(?=,|$)", re.sub(r'"[^"]*"', '""', text))]
    done = {
        "openat": [("create", name)] if "O_CREAT" in text else [],
        "unlink": [("unlink", name)],
        "unlinkat": [("unlink", name)],
        "fsync": [("flush", name)],
        "fdatasync": [("flush", name)],
    }
    if numbers:
        done["ftruncate"] = done["truncate"] = [("cut", name, numbers[-1])]
    if call == "pwrite64":
        return [("write", name, numbers[-1], texts[0][: numbers[0]])]
    return done[call]  # whatever is unforeseen ends here


def main(folder: Path, changes: int, cuts: int, seed: int) -> None:
    Store(folder, create=True, segment_bytes=harness.SEGMENT).close()
    start = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    seeds = {}
    with Store(folder.with_name("digests"), create=True) as store:
        for number in range(40):
            seeds[store.put(f"s{number}", harness.record(number)).digest] = number
    events = traced(folder, changes, seed)
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(1, len(events)), min(cuts, len(events) - 1)))
    files = {name: File(content) for name, content in start.items()}
    model: dict = {}
    under_way, kept = None, 0
    for number, event in enumerate(events):
        kind, *about = event
        if kind == "said":
            line = json.loads(about[0])
            if line[0] == "begin":
                under_way = line[1]
            else:
                model, under_way = harness.applied(model, under_way), None
        elif kind == "flush":
            files[about[0]].flush() if about[0] in files else None  # a folder has no content here
        elif kind != "create" or files.get(about[0], File()).after(rng, 1.0) is None:
            files.setdefault(about[0], File()).since.append((kind, *about[1:]))
        if number in moments:
            disk = folder.with_name("disk")
            _lay_out(disk, files, rng)
            kept += _check(disk, seeds, model, under_way, f"after {number} of {len(events)} {event[:3]}")
    print(json.dumps({"events": len(events), "cuts": len(moments), "kept": kept}))


def _lay_out(disk: Path, files: dict[str, File], rng: random.Random) -> None:
    shutil.rmtree(disk, ignore_errors=True)
    (disk / "segments").mkdir(parents=True)
    share = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0])
    for name, file in files.items():
        content = file.after(rng, share)
        if content is not None:
            (disk / name).write_bytes(content)


def _check(disk: Path, seeds: dict[str, int], model: dict, under_way: list | None, where: str) -> bool:
    """Whether the change under way has happened; leaves the program if anything else is the case."""
    after = harness.shown(harness.applied(model, under_way)) if under_way else None
    fault = now = None
    try:
        now = harness.shown(harness.found(disk, seeds))
        with Store(disk) as store:
            if store.verify().faults:
                store.gc()  # an erasure may be owed
            fault = store.verify().faults
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the cut has done
        fault = f"{type(error).__name__}: {error}"
    if fault or now not in (harness.shown(model), after):
        raise SystemExit(f"{where}: {fault or now} instead of {harness.shown(model)}, under way {under_way}")
    return after is not None and now == after != harness.shown(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

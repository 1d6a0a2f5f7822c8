"""Kills real processes at random moments while they change a store, and compares the store with what they said.

    python crash_harness.py LOCATION ROUNDS SEED

The worker announces every change before it begins and acknowledges it when it has returned. After each kill the
store must be what was acknowledged, or that and the one change that was under way, as a whole.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.store import small_records

from modicum.store import Put, Store
from modicum.store.record import encode, peek

NAMES = [f"users/{n}" for n in range(5)]
#: bytes of a segment, small enough that rounds meet many
SEGMENT = 6000
#: made once and inherited by every worker, so that it spends its short life in the store
record = functools.cache(small_records.record)


def draw(rng: random.Random, model: dict) -> list:
    """A change that the store will accept."""
    filled = [name for name in model if model[name]["versions"]]
    kind = rng.choice(["put", "put", "put", "alias", "alias", "remove", "purge", "gc", "gc"])
    if kind == "put" or not filled:
        return ["put", [[rng.choice(NAMES), rng.randrange(40)] for _ in range(rng.randint(1, 12))]]
    name = rng.choice(filled)
    version = int(rng.choice(list(model[name]["versions"])))
    if kind == "alias":
        return ["alias", name, rng.choice(["production", "canary"]), version]
    if kind == "remove":
        free = [v for v in model[name]["versions"] if int(v) not in model[name]["aliases"].values()]
        return ["remove", name, int(rng.choice(free))] if free else ["gc"]
    return ["purge", name] if kind == "purge" and rng.random() < 0.5 else ["gc"]


def applied(model: dict, change: list) -> dict:
    """The model after the change."""
    model = copy.deepcopy(model)
    kind, *about = change
    if kind == "put":
        for name, seed in about[0]:
            one = model.setdefault(name, {"latest": 0, "versions": {}, "aliases": {}})
            one["latest"] += 1
            one["versions"][str(one["latest"])] = seed
    elif kind == "alias":
        model[about[0]]["aliases"][about[1]] = about[2]
    elif kind == "remove":
        del model[about[0]]["versions"][str(about[1])]
    elif kind == "purge":
        del model[about[0]]
    return model


def act(store: Store, change: list) -> None:
    kind, *about = change
    if kind == "put":
        store.put_many([Put(name, record(seed)) for name, seed in about[0]])
    elif kind == "alias":
        store.alias(f"{about[0]}@{about[2]}", about[1])
    elif kind == "remove":
        store.remove(*about)
    elif kind == "purge":
        store.purge(*about)
    else:
        store.gc(0.0)


def work(folder: Path | str, pipe: int, seed: int, model: dict, changes: float = math.inf) -> None:
    rng, store = random.Random(seed), Store(folder, actor="worker")
    while changes > 0:
        changes -= 1
        change = draw(rng, model)
        os.write(pipe, json.dumps(["begin", change]).encode() + b"\n")
        act(store, change)
        os.write(pipe, b'["end"]\n')
        model = applied(model, change)


def found(folder: Path | str, seeds: dict[str, int]) -> dict:
    """The model that the store shows, every record read and compared."""
    model: dict = {}
    with Store(folder) as store:
        with store._backend.change():
            pass  # a server may still be busy with the last words of the one that was killed
        for version in store.ls():
            one = model.setdefault(version.name, {"latest": 0, "versions": {}, "aliases": {}})
            seed = seeds[version.digest]
            assert store.get(str(version)) == record(seed)
            one["versions"][str(version.version)] = seed
            one["aliases"] |= dict.fromkeys(version.aliases, version.version)
    return model


def shown(model: dict) -> dict:
    """What of a model can be seen: names with versions, without the highest number they had."""
    return {
        name: {"versions": one["versions"], "aliases": one["aliases"]}
        for name, one in model.items()
        if one["versions"]
    }


def kill_once(folder: Path | str, seed: int, model: dict, lines: int, after: float) -> list[list]:
    """What the worker said until it was killed, `after` seconds after it had said so many lines."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            work(folder, writing, seed, model)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as said:
        heard = list(itertools.islice(said, lines))
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        heard += said.readlines()
    if not os.WIFSIGNALED(status):
        raise SystemExit(f"the worker ended by itself, seed {seed}, after {heard[-1:]}")
    return [json.loads(line) for line in heard]


def main(folder: Path | str, rounds: int, seed: int) -> None:
    seeds = {peek(encode(record(number))).digest: number for number in range(40)}
    Store(folder, create=True, segment_bytes=SEGMENT).close()
    rng, model = random.Random(seed), {}
    acknowledged, interrupted, kept = Counter[str](), Counter[str](), 0
    for one in range(rounds):
        lines = kill_once(folder, seed * 100_000 + one, model, rng.randrange(16), rng.uniform(0.0, 0.01))
        under_way = None
        for line in lines:
            if line[0] == "begin":
                under_way = line[1]
            else:
                acknowledged[under_way[0]] += 1
                model, under_way = applied(model, under_way), None
        now = found(folder, seeds)
        if under_way is not None:
            interrupted[under_way[0]] += 1
            after = applied(model, under_way)
            if shown(now) == shown(after) != shown(model):
                model, kept = after, kept + 1
        if shown(now) != shown(model):
            raise SystemExit(f"round {one}: {shown(now)} instead of {shown(model)}, under way {under_way}")
        with Store(folder) as store:
            faults = store.verify().faults
            owed = [fault for fault in faults if "gc finishes that" in fault]
            if owed and (under_way or [""])[0] in ("purge", "gc"):
                store.gc()
                faults = store.verify().faults
            if faults:
                raise SystemExit(f"round {one}: {faults}, under way {under_way}")
    print(json.dumps({"acknowledged": acknowledged, "interrupted": interrupted, "kept": kept}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Zipf traffic over 100,000 stored adapters through a pool of 512, against 512 adapters that are all in memory.

The embedded model and engine, called directly. In turns of some seconds, requests name adapters among the 512 most
wanted ones, all loaded before, or among all, by Zipf's law. A switch is what loading an adapter that is not in memory
takes, while others are answered; what a request waits for it is more where several are missing at once. Memory is what
the process holds, against base + pool + cache.

    python benchmarks/serving/zipf.py [--adapters 100000] [--slots 512] [--rounds 6] [--seconds 20] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent))
from load import percentiles, random_prompts, zipf
from stored import fill

from modicum.serve.engine.embedded import open_engine
from modicum.serve.engine.interface import Observer, Request, Sampling
from modicum.serve.settings import EngineSettings
from modicum.store import Store

RESULT = Path(__file__).parent / "results" / "serving_zipf.json"
MODEL, RANK, PROMPT, TOKENS = "embedded", 16, 32, 32
VOCABULARY = 4096


class Loads(Observer):
    """Seconds of every load."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def load(self, seconds: float, *, failed: bool) -> None:
        """Takes one down."""
        if failed:
            raise SystemExit("an adapter could not be loaded")
        self.seconds.append(seconds)


def resident() -> float:
    """MiB that the process holds."""
    return psutil.Process().memory_info().rss / 2**20


def waited_for(engine: Any) -> list[float]:
    """Seconds that requests whose adapter is not in memory wait for it, from now on."""
    lease, seconds = engine._lease, []  # noqa: SLF001

    async def timed(row: Any, version: str) -> Any:
        missing, began = version not in engine._slots._by_version, time.perf_counter()  # noqa: SLF001
        found = await lease(row, version)
        if missing:
            seconds.append(time.perf_counter() - began)
        return found

    engine._lease = timed  # noqa: SLF001
    return seconds


async def serve(engine: Any, clients: int, seconds: float, draw: Any, seed: int) -> float:
    """Tokens per second of a closed loop that lasts so long."""
    prompt, number, end = (
        random_prompts(PROMPT, VOCABULARY, seed),
        iter(range(1 << 30)),
        time.perf_counter() + seconds,
    )

    async def client() -> int:
        count = 0
        while time.perf_counter() < end:
            request = Request(
                tuple(prompt(next(number))),
                Sampling(TOKENS, temperature=0.0, ignore_eos=True),
                f"user-{draw()}@1",
            )
            async for _ in engine.generate(request):
                count += 1
        return count

    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(client() for _ in range(clients))))
    return tokens / (time.perf_counter() - start)


async def measure(given: argparse.Namespace, store: Store) -> dict[str, Any]:
    loads = Loads()
    settings = EngineSettings(
        MODEL, dtype=given.dtype, max_batch=given.clients, max_batch_tokens=512, cache_tokens=16384,
        slots=given.slots, max_rank=RANK, prefix_caching=False,
    )  # fmt: skip
    before = resident()
    engine, _ = open_engine(settings, store, loads)
    engine.start()
    # as a server does: what there is by now is no garbage, and need not be looked through again and again
    gc.collect()
    gc.freeze()
    waits, waited = waited_for(engine), []
    most_wanted = range(given.slots)
    rng = np.random.default_rng(0)
    rates: dict[str, list[float]] = {"resident": [], "zipf": []}
    seconds: list[float] = []
    first = second = 0.0
    draw_any = zipf(given.adapters, given.exponent, 1)
    hits: list[float] = []
    for turn in range(given.rounds + 1):
        for n in most_wanted:
            await engine.load(f"user-{n}@1")
        if turn == 1:
            first = resident()
        alone = await serve(
            engine, given.clients, given.seconds, lambda: int(rng.integers(given.slots)), 2 * turn
        )
        old, count, before_turn = engine.stats().pool, len(loads.seconds), len(waits)
        mixed = await serve(engine, given.clients, given.seconds, draw_any, 2 * turn + 1)
        new = engine.stats().pool
        if turn:  # the first turn warms up
            rates["resident"].append(alone)
            rates["zipf"].append(mixed)
            seconds += loads.seconds[count:]
            waited += waits[before_turn:]
            hits.append((new.hits - old.hits) / (new.hits - old.hits + new.misses - old.misses))
        second = resident()
        print(f"turn {turn}: {alone:,.0f} and {mixed:,.0f} tokens/s", file=sys.stderr)
    count = len(loads.seconds)
    for n in range(given.adapters // 2, given.adapters // 2 + min(1000, given.adapters // 2)):
        await engine.load(f"user-{n}@1")
    idle = loads.seconds[count:]
    stats = engine.stats()
    base = sum(p.numel() * p.element_size() for p in engine._model.parameters())  # noqa: SLF001
    cache = engine._batching.cache.num_sectors * engine._batching.cache.bytes_per_sector  # noqa: SLF001
    await engine.close()
    ratios = [z / r for z, r in zip(rates["zipf"], rates["resident"], strict=True)]
    return {
        "tokens_per_second": rates,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "hit_rate": statistics.mean(hits),
        "switches": len(seconds),
        "switch_ms": percentiles(seconds),
        "switch_idle_ms": percentiles(idle),
        "waited_ms": percentiles(waited),
        "pool": vars(stats.pool),
        "mib": {
            "process before": before, "base": base / 2**20, "pool": stats.pool.bytes / 2**20, "cache": cache / 2**20,
            "process after the first turn": first, "process after the last turn": second,
        },
    }  # fmt: skip


def table(found: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    speeds = {name: statistics.median(values) for name, values in found["tokens_per_second"].items()}
    mib = found["mib"]

    def spread(key: str) -> str:
        return " / ".join(f"{found[key][p]:.2f}" for p in ("p50", "p99")) if found[key] else "–"

    rows = [
        [f"throughput, all of {given.slots} adapters in memory", f"{speeds['resident']:,.0f} tokens/s"],
        [f"throughput, Zipf over {given.adapters:,}", f"{speeds['zipf']:,.0f} tokens/s"],
        ["ratio", f"{found['ratio']:.3f}"],
        ["found in memory", f"{found['hit_rate']:.0%}"],
        [f"{found['switches']:,} switches while serving, p50 / p99", f"{spread('switch_ms')} ms"],
        ["requests waited for an adapter that was not there, p50 / p99", f"{spread('waited_ms')} ms"],
        ["switches with nothing else to do, p50 / p99", f"{spread('switch_idle_ms')} ms"],
        ["base model", f"{mib['base']:.1f} MiB"],
        ["pool", f"{mib['pool']:.1f} MiB"],
        ["cache", f"{mib['cache']:.1f} MiB"],
        ["base + pool + cache", f"{mib['base'] + mib['pool'] + mib['cache']:.0f} MiB"],
        ["process, grown since before the model was opened",
         f"{mib['process after the last turn'] - mib['process before']:.0f} MiB"],
        ["process, after the first turn → after the last one",
         f"{mib['process after the first turn']:.0f} → {mib['process after the last turn']:.0f} MiB"],
    ]  # fmt: skip
    note = (
        f"Embedded model, {given.dtype}, LoRA-XS r = {RANK} on all linear layers, {given.clients} clients, prompts of "
        f"{PROMPT} and answers of {TOKENS} tokens, exponent {given.exponent}, turns of {given.seconds:.0f} s in "
        f"alternation, {given.threads} thread{'s' if given.threads > 1 else ''}; medians."
    )
    return {"columns": ["", "measured"], "rows": rows, "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two in a turn")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the store is kept between runs")
    parser.add_argument("--small", action="store_true", help="few adapters, nothing written")
    given = parser.parse_args()
    if given.small:
        given.adapters, given.slots, given.rounds, given.seconds = 600, 80, 2, 3.0
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = fill(
            (given.work or Path(temporary)) / f"store-{given.adapters}", MODEL, given.adapters, RANK
        )
        with Store(folder) as store:
            found = asyncio.run(measure(given, store))
    options = f"--adapters {given.adapters} --slots {given.slots} --rounds {given.rounds}"
    result = {
        "what": "Zipf traffic over many stored adapters",
        "command": f"python benchmarks/serving/zipf.py {options} --seconds {given.seconds:.0f}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers")},
        "threads": given.threads,
        **found,
        "table": table(found, given),
    }
    print(json.dumps(result, indent=1))
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Ten minutes of mixed traffic on one server: whether its memory grows.

`modicum serve` with a pool smaller than what is asked for, so that adapters come and go all the time; requests by
Zipf's law, some clients leave in the middle, some name what does not exist, some ask for the base model. Every second
the memory of the server is looked at. Told is the slope after a warm-up, with an interval: half minutes are averaged,
and a line through the averages has a slope with Student's 95 % interval. Quarters of the time after the warm-up tell
whether growth goes on with requests, or was something that fills.

    python benchmarks/serving/soak.py [--seconds 600] [--adapters 5000] [--slots 256]
    python benchmarks/serving/soak.py --warm 120   after two minutes of short ones, so that what fills is full
    python benchmarks/serving/soak.py --fast      short prompts and answers: several times as many requests
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from load import Outcome, Plan, random_prompts, run, zipf
from stored import fill, server

RESULTS = Path(__file__).parent / "results"
MODEL, RANK, CLIENTS = "embedded", 16, 32
#: tokens of prompts and answers, and the name of the result; with --fast and without
SIZES = {True: (8, 2, "serving_soak_fast"), False: (48, 24, "serving_soak")}
#: parts that averages are taken of, and how many of them warm up
PARTS, WARM = 20, 4
QUARTERS = 4


def plan(url: str, given: argparse.Namespace, seconds: float, seed: int, *, fast: bool) -> Plan:
    draw, (prompt, tokens, _) = zipf(given.adapters, 1.0, seed), SIZES[fast]

    def model(number: int) -> str:
        return "nobody" if number % 50 == 0 else "base" if number % 10 == 1 else f"user-{draw()}"

    return Plan(
        url=url, model=model, prompt=random_prompts(prompt, 4096, seed), tokens=tokens, requests=1_000_000,
        seconds=seconds, clients=CLIENTS, leaving=0.05,
    )  # fmt: skip


async def soak(url: str, pid: int, given: argparse.Namespace) -> tuple[Outcome, list[tuple[float, float]]]:
    """What became of the requests, and (second, MiB) once a second."""
    if given.warm:
        await run(plan(url, given, given.warm, 1, fast=True))
    process, memory = psutil.Process(pid), []
    # the engine has one of its own
    processes = [process, *process.children()]

    async def look() -> None:
        start = time.perf_counter()
        while True:
            memory.append((time.perf_counter() - start, sum(p.memory_info().rss for p in processes) / 2**20))
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    outcome = await run(plan(url, given, given.seconds, 0, fast=given.fast))
    looking.cancel()
    return outcome, memory


def slope(memory: list[tuple[float, float]]) -> dict[str, float]:
    """MiB per hour and half of its 95 % interval, without the warm-up."""
    parts = [np.mean(part, axis=0) for part in np.array_split(np.array(memory), PARTS)][WARM:]
    seconds, mib = np.array(parts).T
    line = stats.linregress(seconds, mib)
    half = stats.t.ppf(0.975, len(parts) - 2) * line.stderr
    return {"mib_per_hour": 3600 * float(line.slope), "half_interval": 3600 * float(half)}


def by_quarter(memory: list[tuple[float, float]], outcome: Outcome) -> list[float]:
    """Bytes that each request left behind, by a line through each quarter of the time after the warm-up."""
    warm, ends = (
        np.array(memory[len(memory) * WARM // PARTS :]),
        [one.last or one.start for one in outcome.answers],
    )
    found = []
    for part in np.array_split(warm, QUARTERS):
        seconds, mib = part.T
        requests = sum(seconds[0] <= end < seconds[-1] for end in ends)
        grown = stats.linregress(seconds, mib).slope * (seconds[-1] - seconds[0])
        found.append(float(grown) * 2**20 / max(requests, 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--warm", type=float, default=0.0, help="seconds of short requests before, not counted"
    )
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--fast", action="store_true", help="short prompts and answers")
    parser.add_argument("--small", action="store_true", help="some seconds, nothing written")
    given = parser.parse_args()
    if given.small:
        given.seconds, given.adapters, given.slots = 25.0, 300, 64
    options = [
        "--slots",
        str(given.slots),
        "--max-rank",
        str(RANK),
        "--max-batch",
        "32",
        "--cache-tokens",
        "8192",
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = fill(Path(folder) / "store", MODEL, given.adapters, RANK)
        with server(MODEL, store, Path(folder) / "state", *options) as (url, pid):
            outcome, memory = asyncio.run(soak(url, pid, given))
    result = told(outcome, memory, given)
    print(json.dumps(result["table"], indent=1))
    if not given.small:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{SIZES[given.fast][2]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def told(outcome: Outcome, memory: list[tuple[float, float]], given: argparse.Namespace) -> dict[str, Any]:
    grown, quarters, summary = slope(memory), by_quarter(memory, outcome), outcome.summary()
    warm = memory[len(memory) * WARM // PARTS :]
    prompt, tokens, _ = SIZES[given.fast]
    unknown = summary["errors"].get("404", 0)
    options = f"--seconds {given.seconds:.0f} --warm {given.warm:.0f}{' --fast' if given.fast else ''}"
    rows = [
        ["seconds", f"{summary['seconds']:.0f}"],
        ["requests answered", f"{summary['answered']:,}"],
        ["clients that left in the middle", f"{summary['left']:,}"],
        ["names that do not exist, refused", f"{unknown:,}"],
        ["other errors", f"{sum(summary['errors'].values()) - unknown:,}"],
        ["tokens per second", f"{summary['tokens_per_second']:,.0f}"],
        ["memory after warming up, and at the end", f"{warm[0][1]:.1f}, {warm[-1][1]:.1f} MiB"],
        ["growth, 95 % interval", f"{grown['mib_per_hour']:.1f} ± {grown['half_interval']:.1f} MiB per hour"],
        [
            "growth in the quarters after warming up",
            f"{', '.join(f'{one:.0f}' for one in quarters)} bytes per request",
        ],
    ]
    note = (
        f"Embedded model, {given.adapters:,} LoRA-XS adapters (r = {RANK}) by Zipf's law through {given.slots} slots, "
        f"{CLIENTS} clients, prompts of {prompt} and answers of {tokens} tokens; the first fifth is not counted"
        f"{f', nor {given.warm:.0f} seconds of short requests before it' if given.warm else ''}."
    )
    return {
        "what": "memory of a server in ten minutes of traffic",
        "command": f"python benchmarks/serving/soak.py {options}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers", "uvicorn")},
        **summary,
        "growth": grown,
        "bytes_per_request": quarters,
        "memory_mib": [[round(second), round(mib, 2)] for second, mib in memory[::5]],
        "table": {"columns": ["", "measured"], "rows": rows, "note": note},
    }


if __name__ == "__main__":
    main()

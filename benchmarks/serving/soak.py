"""Ten minutes of mixed traffic on one server: whether its memory grows.

`modicum serve` with a pool smaller than what is asked for, so that adapters come and go all the time; requests by
Zipf's law, some clients leave in the middle, some name what does not exist, some ask for the base model. Every second
the memory of the server is looked at. Told is the slope after a warm-up, with an interval: half minutes are averaged,
and a line through the averages has a slope with Student's 95 % interval.

    python benchmarks/serving/soak.py [--seconds 600] [--adapters 5000] [--slots 256]
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

RESULT = Path(__file__).parent / "results" / "serving_soak.json"
MODEL, RANK, PROMPT, TOKENS, CLIENTS = "embedded", 16, 48, 24, 32
#: parts that averages are taken of, and how many of them warm up
PARTS, WARM = 20, 4


async def soak(url: str, pid: int, given: argparse.Namespace) -> tuple[Outcome, list[tuple[float, float]]]:
    """What became of the requests, and (second, MiB) once a second."""
    draw, memory = zipf(given.adapters, 1.0, 0), []
    process = psutil.Process(pid)

    def model(number: int) -> str:
        return "nobody" if number % 50 == 0 else "base" if number % 10 == 1 else f"user-{draw()}"

    plan = Plan(
        url=url, model=model, prompt=random_prompts(PROMPT, 4096, 0), tokens=TOKENS, requests=1_000_000,
        seconds=given.seconds, clients=CLIENTS, leaving=0.05,
    )  # fmt: skip

    async def look() -> None:
        start = time.perf_counter()
        while True:
            memory.append((time.perf_counter() - start, process.memory_info().rss / 2**20))
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    outcome = await run(plan)
    looking.cancel()
    return outcome, memory


def slope(memory: list[tuple[float, float]]) -> dict[str, float]:
    """MiB per hour and half of its 95 % interval, without the warm-up."""
    parts = [np.mean(part, axis=0) for part in np.array_split(np.array(memory), PARTS)][WARM:]
    seconds, mib = np.array(parts).T
    line = stats.linregress(seconds, mib)
    half = stats.t.ppf(0.975, len(parts) - 2) * line.stderr
    return {"mib_per_hour": 3600 * float(line.slope), "half_interval": 3600 * float(half)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="some seconds, nothing written")
    given = parser.parse_args()
    if given.small:
        given.seconds, given.adapters, given.slots = 15.0, 300, 64
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
    grown = slope(memory)
    told = outcome.summary()
    warm = memory[len(memory) * WARM // PARTS :]
    rows = [
        ["seconds", f"{told['seconds']:.0f}"],
        ["requests answered", f"{told['answered']:,}"],
        ["clients that left in the middle", f"{told['left']:,}"],
        ["names that do not exist, refused", f"{told['errors'].get('404', 0):,}"],
        ["other errors", f"{sum(told['errors'].values()) - told['errors'].get('404', 0):,}"],
        ["tokens per second", f"{told['tokens_per_second']:,.0f}"],
        ["memory after warming up, and at the end", f"{warm[0][1]:.1f}, {warm[-1][1]:.1f} MiB"],
        ["growth, 95 % interval", f"{grown['mib_per_hour']:.1f} ± {grown['half_interval']:.1f} MiB per hour"],
    ]
    note = (
        f"Embedded model, {given.adapters:,} LoRA-XS adapters (r = {RANK}) by Zipf's law through {given.slots} slots, "
        f"{CLIENTS} clients, prompts of {PROMPT} and answers of {TOKENS} tokens; the first fifth is not counted."
    )
    result: dict[str, Any] = {
        "what": "memory of a server in ten minutes of traffic",
        "command": f"python benchmarks/serving/soak.py --seconds {given.seconds:.0f}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers", "uvicorn")},
        **told,
        "growth": grown,
        "memory_mib": [[round(second), round(mib, 2)] for second, mib in memory[::5]],
        "table": {"columns": ["", "measured"], "rows": rows, "note": note},
    }
    print(json.dumps(result["table"], indent=1))
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

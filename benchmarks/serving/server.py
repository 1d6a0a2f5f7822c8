"""What HTTP costs: `modicum serve` and the same engine called directly, in turn, and seconds to the first token.

Two processes with the same model and store take turns: one has the engine alone, the other one is the server, asked by
the load generator from a third. Every request streams its answer and names one of 64 LoRA-XS adapters. Then the server
is asked at random moments, at shares of what it managed.

    python benchmarks/serving/server.py [--model embedded llama] [--clients 1 8 32] [--rounds 4] [--small]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from load import Plan, random_prompts, run
from stored import fill, random_llama, server

RESULT = Path(__file__).parent / "results" / "serving_http.json"
ADAPTERS, RANK, PROMPT, TOKENS = 64, 16, 32, 48
VOCABULARY = 4096
#: shares of the closed loop's throughput at which requests arrive
SHARES = (0.5, 0.8)
SETTINGS = {"max_batch": 64, "max_batch_tokens": 512, "cache_tokens": 32768, "slots": 128, "max_rank": 16}
OPTIONS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def answer_directly(model: str, store: str) -> None:
    """Runs in a process of its own: a line of JSON with clients and requests in, seconds and tokens out."""
    from modicum.serve.engine.embedded import open_engine
    from modicum.serve.engine.interface import Request, Sampling
    from modicum.serve.settings import EngineSettings
    from modicum.store import Store

    engine, _ = open_engine(EngineSettings(model, **SETTINGS), Store(store))
    engine.start()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        print("ready", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            asked = json.loads(line)
            numbers, tokens = iter(range(asked["requests"])), 0
            prompt = random_prompts(PROMPT, VOCABULARY, asked["seed"])

            async def client(numbers: Any = numbers, prompt: Any = prompt) -> int:
                count = 0
                for number in numbers:
                    request = Request(
                        tuple(prompt(number)),
                        Sampling(TOKENS, temperature=0.0, ignore_eos=True),
                        f"user-{number % ADAPTERS}@1",
                    )
                    async for _ in engine.generate(request):
                        count += 1
                return count

            start = time.perf_counter()
            tokens = sum(await asyncio.gather(*(client() for _ in range(asked["clients"]))))
            print(json.dumps({"tokens_per_second": tokens / (time.perf_counter() - start)}), flush=True)
        await engine.close()

    asyncio.run(serve())


class Direct:
    """The engine in a process of its own."""

    def __init__(self, model: str, store: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--directly", model, str(store)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._say()

    def ask(self, **what: int) -> float:
        """Tokens per second of a round."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._say())["tokens_per_second"]

    def end(self) -> None:
        """Returns when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _say(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the engine's process ended")
        return line


def plan(url: str, clients: int, requests: int, seed: int, rate: float | None = None) -> Plan:
    return Plan(
        url=url,
        model=lambda n: f"user-{n % ADAPTERS}",
        prompt=random_prompts(PROMPT, VOCABULARY, seed),
        tokens=TOKENS,
        requests=requests,
        seconds=60,
        clients=clients,
        rate=rate,
        seed=seed,
    )


def measure(name: str, model: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turn for each number of clients, then requests at random moments."""
    store = fill(folder / f"store-{name}", model, ADAPTERS, RANK)
    direct = Direct(model, store)
    found: dict[str, Any] = {}
    with server(model, store, folder / f"state-{name}", *OPTIONS) as (url, _):
        for clients in given.clients:
            requests = max(clients * given.each, 4)
            ways: dict[str, list[float]] = {"engine": [], "server": []}
            last: dict[str, Any] = {}
            for seed in range(given.rounds + 1):
                alone = direct.ask(clients=clients, requests=requests, seed=seed)
                last = asyncio.run(run(plan(url, clients, requests, seed))).summary()
                if last["errors"]:
                    raise SystemExit(f"the server failed: {last['errors']}")
                if seed:  # the first round loads adapters
                    ways["engine"].append(alone)
                    ways["server"].append(last["tokens_per_second"])
            ratios = [s / e for s, e in zip(ways["server"], ways["engine"], strict=True)]
            found[f"{clients} clients"] = {
                **ways, "ratio": statistics.median(ratios), "ratios": ratios,
                "first_token_ms": last["first_token_ms"], "token_ms": last["token_ms"],
            }  # fmt: skip
            print(name, clients, json.dumps(found[f"{clients} clients"]), file=sys.stderr)
        most = max(statistics.median(one["server"]) for one in found.values()) / TOKENS
        for share in SHARES:
            rate = share * most
            requests = max(8, int(rate * given.seconds))
            open_loop = asyncio.run(run(plan(url, 1, requests, 99, rate))).summary()
            found[f"arriving at {share:.0%}"] = {"requests_per_second": rate, **open_loop}
            print(name, share, json.dumps(open_loop), file=sys.stderr)
    direct.end()
    return found


def table(found: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, cases in found.items():
        for case, one in cases.items():
            if "ratio" in one:
                speeds = [f"{statistics.median(one[way]):,.0f}" for way in ("engine", "server")]
                rows.append([name, case, *speeds, f"{one['ratio']:.3f}"])
            else:
                rows.append([name, case, "–", f"{one['tokens_per_second']:,.0f}", "–"])
            for key in ("first_token_ms", "token_ms"):
                rows[-1].append(" / ".join(f"{one[key][p]:.1f}" for p in ("p50", "p99")) if one[key] else "–")
    return {
        "columns": [
            "model", "load", "engine, tokens/s", "server, tokens/s", "server ÷ engine", "first token, ms",
            "each token, ms",
        ],
        "rows": rows,
        "note": f"Prompts of {PROMPT} tokens, answers of {TOKENS}, one of {ADAPTERS} LoRA-XS adapters (r = {RANK}) per "
        "request; streamed. Times are p50 / p99 at the client. Arriving at 80 %: a request comes at random moments, "
        "at 80 % of the highest throughput above. One thread computes.",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=("embedded", "llama"), default=["embedded", "llama"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--each", type=int, default=2, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of requests at random moments")
    parser.add_argument("--small", action="store_true", help="a small random model, nothing written")
    parser.add_argument("--directly", nargs=2, metavar=("MODEL", "STORE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.directly:
        answer_directly(*given.directly)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.model:
            model = (
                "embedded"
                if name == "embedded"
                else str(random_llama(Path(folder) / "llama", small=given.small))
            )
            shown = "embedded" if name == "embedded" else "random Llama, 768 wide"
            found[shown] = measure(name, model, Path(folder), given)
    options = f"--rounds {given.rounds} --clients {' '.join(map(str, given.clients))}"
    result = {
        "what": "HTTP against the engine called directly",
        "command": f"python benchmarks/serving/server.py {options}",
        "versions": {
            name: version(name) for name in ("modicum", "torch", "transformers", "fastapi", "uvicorn")
        },
        **found,
        "table": table(found),
    }
    print(json.dumps(result["table"], indent=1))
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""A load generator for servers of the OpenAI API on this machine, bounded in requests and in time.

Closed loop: so many clients ask one request after the other. Open loop: requests arrive at a rate, at random (Poisson),
whether earlier ones have been answered or not. Adapters are drawn by Zipf's law, prompts at random, and answers are
streamed. Told are seconds to the first token, seconds for each further one, tokens per second, and errors by kind.

    python benchmarks/serving/load.py http://127.0.0.1:8000/v1 --model base --clients 32
    python benchmarks/serving/load.py http://127.0.0.1:8000/v1 --model 'user-{}' --of 1000 --rate 20 --seconds 30

Other machines are refused: this finds out what a machine of one's own can do, and is no weapon.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ipaddress
import json
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: no run is longer, whatever is asked for
MOST_REQUESTS, MOST_SECONDS, MOST_CLIENTS = 1_000_000, 1800.0, 4096


@dataclass(frozen=True)
class Plan:
    """What is asked, how often, and for how long."""

    url: str
    #: the model of the request with this number
    model: Callable[[int], str]
    #: its prompt
    prompt: Callable[[int], list[int]]
    tokens: int = 32
    requests: int = 1000
    seconds: float = 60.0
    #: clients of a closed loop
    clients: int = 32
    #: requests per second of an open loop, in place of clients
    rate: float | None = None
    key: str | None = None
    #: the share of clients that leave in the middle of an answer
    leaving: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """What became of one request; moments are in seconds since the run began."""

    start: float
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    error: str | None = None
    left: bool = False


@dataclass
class Outcome:
    """What became of all of them."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Counts, rates, and percentiles in milliseconds."""
        done = [one for one in self.answers if one.error is None and not one.left]
        first = [one.first - one.start for one in done if one.first is not None]
        each = [
            (one.last - one.first) / (one.tokens - 1)
            for one in done
            if one.first and one.last and one.tokens > 1
        ]
        errors = collections.Counter(one.error for one in self.answers if one.error is not None)
        return {
            "requests": len(self.answers),
            "answered": len(done),
            "left": sum(one.left for one in self.answers),
            "errors": dict(errors),
            "seconds": round(self.seconds, 3),
            "requests_per_second": round(len(done) / self.seconds, 2) if self.seconds else 0.0,
            "tokens_per_second": round(sum(one.tokens for one in self.answers) / self.seconds, 1)
            if self.seconds
            else 0.0,
            "first_token_ms": percentiles(first),
            "token_ms": percentiles(each),
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 in milliseconds; None of nothing."""
    if not seconds:
        return None
    found = np.percentile(seconds, [50, 90, 99]) * 1e3
    return dict(zip(("p50", "p90", "p99"), (round(float(value), 3) for value in found), strict=True))


def zipf(count: int, exponent: float, seed: int) -> Callable[[], int]:
    """Draws 0 … `count` − 1, the n-th with a probability that goes with 1 / (n + 1) ** `exponent`."""
    rng = np.random.default_rng(seed)
    edges = np.cumsum(1.0 / np.arange(1, count + 1) ** exponent)
    return lambda: int(np.searchsorted(edges, rng.random() * edges[-1]))


def random_prompts(length: int, vocabulary: int, seed: int) -> Callable[[int], list[int]]:
    """Prompts that share no beginning, so that none is found in a cache."""
    return lambda n: np.random.default_rng([seed, n]).integers(10, vocabulary, length).tolist()


def check(plan: Plan) -> None:
    """Returns if the plan stays on this machine and ends; says all that is wrong otherwise."""
    faults = []
    host = urlsplit(plan.url).hostname or ""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        found = set()
        faults.append(f"{host!r} is not known ({error})")
    if any(not ipaddress.ip_address(address).is_loopback for address in found):
        faults.append(f"{host} is another machine; load is only put on this one (127.0.0.1)")
    for name, value, most in (
        ("requests", plan.requests, MOST_REQUESTS),
        ("seconds", plan.seconds, MOST_SECONDS),
        ("clients", plan.clients, MOST_CLIENTS),
    ):
        if not 0 < value <= most:
            faults.append(f"{name} = {value}, must be above 0 and at most {most}")
    if plan.rate is not None and plan.rate <= 0:
        faults.append(f"rate = {plan.rate}, must be above 0")
    if faults:
        raise SystemExit("; ".join(faults))


async def run(plan: Plan) -> Outcome:
    """What became of the requests of `plan`."""
    check(plan)
    outcome, began = Outcome(), time.perf_counter()
    headers = {"Authorization": f"Bearer {plan.key}"} if plan.key else {}
    limits = aiohttp.ClientTimeout(total=plan.seconds + 60)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), headers=headers, timeout=limits
    ) as session:
        load = _open if plan.rate is not None else _closed
        await load(plan, session, outcome, began)
    outcome.seconds = max((one.last or one.start for one in outcome.answers), default=0.0)
    return outcome


async def _closed(plan: Plan, session: aiohttp.ClientSession, outcome: Outcome, began: float) -> None:
    numbers = iter(range(plan.requests))

    async def client() -> None:
        for number in numbers:
            if time.perf_counter() - began >= plan.seconds:
                return
            await _ask(plan, session, outcome, began, number)

    await asyncio.gather(*(client() for _ in range(min(plan.clients, plan.requests))))


async def _open(plan: Plan, session: aiohttp.ClientSession, outcome: Outcome, began: float) -> None:
    assert plan.rate is not None
    rng, due = np.random.default_rng(plan.seed), 0.0
    running: set[asyncio.Task[None]] = set()
    for number in range(plan.requests):
        due += float(rng.exponential(1 / plan.rate))
        if due >= plan.seconds:
            break
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
        task = asyncio.create_task(_ask(plan, session, outcome, began, number))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _ask(
    plan: Plan, session: aiohttp.ClientSession, outcome: Outcome, began: float, number: int
) -> None:
    leaves = np.random.default_rng([plan.seed, number, 1]).random() < plan.leaving
    body = {
        "model": plan.model(number), "prompt": plan.prompt(number), "max_tokens": plan.tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip
    answer = Answer(time.perf_counter() - began)
    outcome.answers.append(answer)
    try:
        async with session.post(f"{plan.url}/completions", json=body) as response:
            if response.status != 200:
                answer.error = str(response.status)
                # whoever is told to come back later does
                await asyncio.sleep(min(1.0, float(response.headers.get("Retry-After", 0))))
                return
            await _read(response, answer, began, leaves=leaves)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        answer.error = type(error).__name__


async def _read(response: aiohttp.ClientResponse, answer: Answer, began: float, *, leaves: bool) -> None:
    usage = None
    async for line in response.content:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        now = time.perf_counter() - began
        if b'"error"' in line:
            answer.error = json.loads(line[6:])["error"].get("code") or "stream"
            return
        if b'"usage":{' in line or b'"usage": {' in line:
            usage = json.loads(line[6:])["usage"]
            continue
        answer.first = answer.first or now
        answer.last = now
        if leaves:
            answer.left = True
            response.close()
            return
    answer.last = answer.last or time.perf_counter() - began
    answer.tokens = 0 if usage is None else usage["completion_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url")
    parser.add_argument("--model", default="base", help="a name; '{}' in it stands for a number below --of")
    parser.add_argument("--of", type=int, default=1)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0 draws all alike")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rate", type=float, help="requests per second, in place of clients")
    parser.add_argument("--key")
    given = parser.parse_args()
    draw = zipf(given.of, given.zipf, 0)
    plan = Plan(
        url=given.url.rstrip("/"),
        model=lambda _: given.model.format(draw()),
        prompt=random_prompts(given.prompt, given.vocabulary, 0),
        tokens=given.tokens,
        requests=given.requests,
        seconds=given.seconds,
        clients=given.clients,
        rate=given.rate,
        key=given.key,
    )
    with contextlib.suppress(KeyboardInterrupt):
        print(json.dumps(asyncio.run(run(plan)).summary(), indent=1))


if __name__ == "__main__":
    main()

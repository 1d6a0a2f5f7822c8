"""The fleet of `books.py` served: every user by name through `modicum serve`, checked against offline, and how fast.

Takes the folder that `books.py` leaves (rows, job, store). Some users are asked all at once, each for a passage of
its own, and their answers are compared with those of the same versions loaded by Transformers and PEFT. Then 64
clients ask, in turn, the base model alone and every adapter of the fleet once, through a pool that holds a part of
them; and last the users by Zipf's law, as they come on a real day.

    python benchmarks/fleet/serve_books.py --work build/books [--threads 4] [--small]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))
from load import Plan, run, zipf
from stored import server

from modicum.models.loading import load_base, load_tokenizer
from modicum.store import Store
from modicum.store.files import install
from modicum.store.state import AdapterState, config_from, state_from

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT = Path(__file__).parent / "results" / "fleet_served.json"
MODEL = "embedded"
#: tokens of a prompt and of an answer; users who are asked at once and compared
PROMPT, TOKENS, SAMPLE = 24, 32, 64
CLIENTS, SLOTS = 64, 256
SETTINGS = {
    "dtype": "float32", "max-batch": CLIENTS, "cache-tokens": 32768, "slots": SLOTS, "max-rank": 16,
}  # fmt: skip


@dataclass(frozen=True)
class User:
    """A user with an adapter: its version in the store, and beginnings of its own passages as tokens."""

    version: str
    prompts: Sequence[list[int]]

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.version.partition("@")[0]


def fleet(work: Path) -> tuple[list[User], int]:
    """The users with adapters, and how many have none."""
    texts: dict[str, list[str]] = {}
    with (work / "users.jsonl").open(encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            texts.setdefault(row["user"], []).append(row["text"])
    table = pq.read_table(work / "run" / "users.parquet", columns=["user", "state", "version"]).to_pylist()
    tokenizer = load_tokenizer(MODEL)
    found = [
        User(row["version"], [ids[:PROMPT] for ids in tokenizer(texts[row["user"]]).input_ids])
        for row in table
        if row["state"] == "stored"
    ]
    return found, len(table) - len(found)


async def answers(url: str, users: Sequence[User]) -> list[str]:
    """What every user's model goes on with, all of them asked at once."""

    async def one(client: openai.AsyncOpenAI, user: User) -> str:
        options = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        answer = await client.completions.create(model=user.name, prompt=list(user.prompts[-1]), **options)
        return answer.choices[0].text

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        return await asyncio.gather(*(one(client, user) for user in users))


@torch.no_grad()
def offline(store: Path, users: Sequence[User]) -> list[str]:
    """What their versions answer alone, by Transformers and PEFT."""
    tokenizer, model, found = load_tokenizer(MODEL), None, []
    with Store(store) as opened:
        for user in users:
            record = opened.get(user.version)
            if model is None:
                model = install(load_base(MODEL, dtype="float32"), config_from(record), state_from(record))
            AdapterState.of(model, "default").copy_from(state_from(record))
            prompt = user.prompts[-1]
            ids = torch.tensor([prompt])
            answer = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
            whole = tokenizer.decode(answer[0].tolist(), skip_special_tokens=True)
            found.append(whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :])
    return found


def counted(url: str) -> dict[str, float]:
    """What the server has counted so far."""
    with urllib.request.urlopen(url.replace("/v1", "/metrics"), timeout=60) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^modicum_(\w+) (\S+)$", text, re.MULTILINE)}


def load(url: str, asked: Sequence[tuple[str, list[int]]], seconds: float = 300.0) -> dict[str, Any]:
    """What 64 clients see who ask for so many models with prompts, and what the server's pool did meanwhile."""
    plan = Plan(
        url=url, model=lambda n: asked[n][0], prompt=lambda n: asked[n][1], tokens=TOKENS, requests=len(asked),
        seconds=seconds, clients=CLIENTS,
    )  # fmt: skip
    before = counted(url)
    found = asyncio.run(run(plan)).summary()
    if found["errors"]:
        raise SystemExit(f"the server failed: {found['errors']}")
    after = counted(url)
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}
    hits, misses = more["pool_hits_total"], more["pool_misses_total"]
    loads = more["adapter_load_seconds_count"]
    return found | {
        "found_in_memory": hits / (hits + misses) if hits + misses else None,
        "loads": misses,
        "load_ms": 1e3 * more["adapter_load_seconds_sum"] / loads if loads else None,
        "sequences_per_step": more["step_sequences_total"] / more["steps_total"],
    }


def measure(users: list[User], store: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    options = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    rng = np.random.default_rng(0)
    shuffled = [users[at] for at in rng.permutation(len(users))]
    turns: dict[str, list[dict[str, Any]]] = {"base": [], "every adapter once": []}
    with server(MODEL, store, folder / "state", *options, "--no-prefix-caching", threads=given.threads) as (
        url,
        _,
    ):
        sample = shuffled[:SAMPLE]
        told = asyncio.run(answers(url, sample))
        for turn in range(given.rounds):
            asked = [(user.name, list(user.prompts[turn % len(user.prompts)])) for user in shuffled]
            turns["base"].append(load(url, [("base", prompt) for _, prompt in asked]))
            turns["every adapter once"].append(load(url, asked))
            print(json.dumps({name: one[-1] for name, one in turns.items()}), file=sys.stderr)
        draw = zipf(len(shuffled), 1.0, 0)
        drawn = [(shuffled[draw()], n) for n in range(given.requests)]
        real = [(user.name, list(user.prompts[n % len(user.prompts)])) for user, n in drawn]
        turns["zipf"] = [load(url, real, given.seconds)]
        drawn_names = {name for name, _ in real[: turns["zipf"][0]["requests"]]}
    # one token of one sequence at a time gains nothing from threads
    torch.set_num_threads(1)
    alone = offline(store, sample)
    equal = sum(one == other for one, other in zip(told, alone, strict=True))
    return {"compared": len(sample), "equal": equal, "asked_by_zipf": len(drawn_names), **turns}


def table(values: dict[str, Any]) -> dict[str, Any]:
    once, base, real = values["every adapter once"], values["base"], values["zipf"][0]

    def median(turns: list[dict[str, Any]], name: str) -> float:
        return statistics.median(one[name] for one in turns)

    speed = median(once, "tokens_per_second")
    rows = [
        ["users with adapters, each served by name", f"{values['adapters']:,} of {values['users']:,}"],
        [f"answers of {values['compared']} users at once, equal to offline", f"{values['equal']}"],
        ["every adapter once: seconds", f"{median(once, 'seconds'):.1f}"],
        ["requests per second", f"{median(once, 'requests_per_second'):.1f}"],
        ["tokens per second", f"{speed:,.0f}"],
        ["against the base model alone", f"{speed / median(base, 'tokens_per_second'):.3f}"],
        ["sequences in a step, mean", f"{median(once, 'sequences_per_step'):.1f}"],
        ["milliseconds to load an adapter, mean", f"{median(once, 'load_ms'):.2f}"],
        [
            "milliseconds to the first token, p50 / p99",
            " / ".join(
                f"{statistics.median(one['first_token_ms'][p] for one in once):.0f}" for p in ("p50", "p99")
            ),
        ],
        [
            f"by Zipf's law, {values['asked_by_zipf']:,} users: tokens per second",
            f"{real['tokens_per_second']:,.0f}",
        ],
        ["adapters found in memory", f"{real['found_in_memory']:.0%}"],
    ]
    return {
        "columns": ["", "fleet out of books, served"],
        "rows": rows,
        "note": f"`modicum serve` with the model inside modicum in float32, {CLIENTS} clients, {SLOTS} adapters in "
        f"memory, prompts of {PROMPT} tokens out of the users' own passages, answers of {TOKENS}, streamed; "
        f"{len(once)} turns of the base model and of all adapters, medians. Threads: {values['threads']}.",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="the folder of a finished books.py")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=20_000, help="by Zipf's law, at most")
    parser.add_argument("--seconds", type=float, default=45.0, help="of requests by Zipf's law")
    parser.add_argument("--small", action="store_true", help="128 users, short turns, nothing written")
    given = parser.parse_args()
    users, without = fleet(given.work)
    everybody = len(users) + without
    if given.small:
        users, given.rounds, given.seconds = users[:128], 1, 5.0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(users, given.work / "store", Path(folder), given)
    values = {
        "what": "the fleet out of books, served",
        "command": f"python benchmarks/fleet/serve_books.py --work build/books --threads {given.threads}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers")},
        "threads": given.threads,
        "users": everybody,
        "adapters": len(users),
        **found,
    }
    values["table"] = table(values)
    print(json.dumps(values["table"], indent=1))
    if not given.small:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the tests run in vLLM's environment: requests in, tokens out, both as JSON.

python in_vllm.py < {"store": FOLDER, "settings": {...}, "requests": [{"prompt": [...], "version": "ada@1"}, ...]}
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from modicum.errors import ModicumError
from modicum.serve.engine.interface import Request, Sampling
from modicum.serve.settings import EngineSettings
from modicum.serve.vllm.engine import Monitor, open_engine
from modicum.store import Store


async def answer(engine, asked: dict) -> dict:
    sampling = Sampling(
        **({"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | asked.get("sampling", {}))
    )
    request = Request(tuple(asked["prompt"]), sampling, asked.get("version"), asked.get("salt", ""))
    steps = []
    try:
        if asked.get("unload_first"):
            await engine.unload(request.version)
        async for step in engine.generate(request):
            steps.append(step)
            if len(steps) == asked.get("leave_after"):
                break
    except ModicumError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "tokens": [step.token for step in steps],
        "finish": steps[-1].finish,
        "logprobs": [step.logprob for step in steps],
        "top": [step.top for step in steps],
    }


def watch(adapters: list[int]) -> None:
    """Keep how many adapters are in each step, as vLLM's scheduler says it."""
    record = Monitor.record

    def watched(self: Monitor, scheduled: Any, iteration: Any) -> None:
        if scheduled is not None:
            adapters.append(len(scheduled.running_lora_adapters))
        record(self, scheduled, iteration)

    Monitor.record = watched


async def main(asked: dict) -> dict:
    store = Store(asked["store"])
    engine, _ = open_engine(EngineSettings(**asked["settings"]), store)
    adapters: list[int] = []
    watch(adapters)
    await asyncio.to_thread(engine.start)
    found: dict = {"rounds": []}
    for requests in asked["rounds"]:
        adapters.clear()
        answers = await asyncio.gather(*(answer(engine, one) for one in requests))
        stats = engine.stats()
        found["rounds"].append(
            {
                "answers": answers,
                "cached": stats.cached_tokens,
                "adapters": max(adapters, default=0),
                "pool": vars(stats.pool),
                "residents": [one.version for one in engine.residents()],
                "used": [one.requests for one in engine.residents()],
            }
        )
    await engine.close()
    found["alive"] = engine.alive
    return found


if __name__ == "__main__":
    result = asyncio.run(main(json.load(sys.stdin)))
    print("RESULT " + json.dumps(result))

"""Steps of the embedded engine: its attention against Transformers' own, and adapters against none, in turn.

A random Llama of 110M parameters (hidden 768, 12 layers), or the model inside modicum. Every variant is an engine of
its own whose sequences are running; they are paused in turn, so that one computes at a time and a slow moment hits all
alike. A step is all of it: scheduling, forward pass, sampling, telling. Decoding only, one token of each sequence.

    python benchmarks/serving/engine.py [--model embedded] [--threads 1] [--rounds 20] [--small] [--only bfloat16]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from layers import RANK, linears, llama, lora_xs, tenth

from modicum.models.loading import EMBEDDED, load_base
from modicum.serve.engine import batching
from modicum.serve.engine.attention import register
from modicum.serve.engine.embedded import EmbeddedEngine
from modicum.serve.engine.interface import Observer, Request, Sampling
from modicum.serve.engine.native import paged
from modicum.serve.settings import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results"
#: --model -> what it is, and the tokens that there is memory for
MODELS = {
    "random": ("a random Llama of 110M parameters", 16384),
    EMBEDDED: ("the model inside modicum", 65536),
}
#: steps of a turn; the first one of them is not counted
TURN = 6
#: comparisons: name -> (batch, tokens of each prompt, variants, the first of which the others are compared with)
CASES = {
    "batch 32, context 200": (32, 200, ("Transformers' sdpa", "by request")),
    "batch 1, context 16": (1, 16, ("by request", "64 adapters")),
    "batch 8, context 16": (8, 16, ("by request", "64 adapters")),
    "batch 64, context 16": (64, 16, ("by request", "64 adapters")),
}


class Clock(Observer):
    """When steps ended that were nothing but decoding of a whole batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.ends: list[float] = []

    def step(self, sequences: int, tokens: int, seconds: float) -> None:  # noqa: ARG002 - all of a step counts
        """Notes the end of a step."""
        if sequences == tokens == self.batch:
            self.ends.append(time.perf_counter())


class Variant:
    """An engine with running sequences."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
        own = arguments.model == EMBEDDED
        model = load_base(EMBEDDED).to(dtype) if own else llama(dtype, arguments.small)
        shapes, self.vocabulary = linears(model), model.config.vocab_size
        settings = EngineSettings(
            arguments.model, max_batch=64, max_batch_tokens=512, cache_tokens=MODELS[arguments.model][1], slots=64,
            max_rank=RANK, prefix_caching=False,
        )  # fmt: skip
        self.adapters, self.clock = name == "64 adapters", Clock(batch)
        batching.register = (lambda: "sdpa") if name == "Transformers' sdpa" else register
        self.engine = EmbeddedEngine(
            model,
            settings,
            read=lambda which: lora_xs(shapes, int(which.partition("@")[2])),
            observer=self.clock,
        )
        self.engine.start()
        self._pause: Any = None

    async def begin(self, context: int, tokens: int) -> None:
        """Returns when all sequences are decoding and the engine is paused."""
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(tokens, temperature=0.0, ignore_eos=True)
        self.tasks = []
        for number in range(self.clock.batch):
            prompt = torch.randint(10, self.vocabulary, (context,), generator=generator).tolist()
            which = f"a@{number + 1}" if self.adapters else None
            self.tasks.append(asyncio.create_task(self._follow(Request(tuple(prompt), sampling, which))))
        while len(self.clock.ends) < 2:  # noqa: ASYNC110 - another thread computes
            await asyncio.sleep(0.01)
        self.pause()

    async def _follow(self, request: Request) -> None:
        async for _ in self.engine.generate(request):
            pass

    def pause(self) -> None:
        """Returns when nothing is computed."""
        self._pause = self.engine._batching._manager.pause()  # noqa: SLF001 - nobody else needs to
        self._pause.__enter__()

    async def turn(self) -> list[float]:
        """Seconds of some steps."""
        self.clock.ends.clear()
        self._pause.__exit__(None, None, None)
        while len(self.clock.ends) <= TURN:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.002)
        self.pause()
        ends = self.clock.ends[1:]
        return [after - before for before, after in itertools.pairwise(ends)]

    async def end(self) -> None:
        """Returns when the engine is closed."""
        self._pause.__exit__(None, None, None)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.engine.close()


async def case(name: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each variant's steps."""
    (batch, context, names), rounds = CASES[name], arguments.rounds
    variants = {which: Variant(which, batch, dtype, arguments) for which in names}
    times: dict[str, list[float]] = {which: [] for which in names}
    with ended(variants):
        for variant in variants.values():
            # more than a turn may run before a pause takes hold
            await variant.begin(context, min(500 - context, 4 * TURN * (rounds + 2)))
        for turn in range(-1, rounds):
            for which, variant in variants.items():
                found = await variant.turn()
                times[which] += found if turn >= 0 else []
        for variant in variants.values():
            await variant.end()
    return times


@contextlib.contextmanager
def ended(variants: dict[str, Variant]) -> Iterator[None]:
    """Forgets the engines when done, and puts back the attention."""
    try:
        yield
    finally:
        batching.register = register
        variants.clear()
        gc.collect()


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    first, *_ = times
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(found),
            "tenth": tenth(times[first]) / tenth(found),
            "median": statistics.median(times[first]) / statistics.median(found),
            "steps": len(found),
        }
        for name, found in times.items()
    }


def table(found: dict[str, Any], model: str, note: str) -> dict[str, Any]:
    rows = []
    for dtype, cases in found.items():
        for name, values in cases.items():
            (first, base), *others = values.items()
            rows += [
                [
                    dtype, name, first, f"{base['milliseconds']:.1f}", other, f"{value['milliseconds']:.1f}",
                    f"{value['tenth']:.3f} / {value['median']:.3f}",
                ]
                for other, value in others
            ]  # fmt: skip
    what = f"Decoding steps of the embedded engine, {model}; speed of the second against the "
    return {
        "columns": ["type", "running", "first", "ms", "second", "ms", "speed"],
        "rows": rows,
        "note": f"{what}first (tenth percentile / median). Adapters: LoRA-XS of rank {RANK} on all linear layers, one "
        f"for every sequence. {note}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--only", choices=("float32", "bfloat16"), help="nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        if arguments.only in (None, dtype):
            found[dtype] = {}
            for name in CASES:
                times = asyncio.run(case(name, getattr(torch, dtype), arguments))
                found[dtype][name] = summary(times)
                print(dtype, name, json.dumps(found[dtype][name], indent=1), flush=True)
    if arguments.small or arguments.only:
        return
    options = "" if arguments.model == "random" else f"--model {arguments.model} "
    options += f"--threads {arguments.threads} --rounds {arguments.rounds}"
    about = {
        "what": "steps of the embedded engine",
        "command": f"python benchmarks/serving/engine.py {options}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers")},
        "threads": arguments.threads,
        "native": paged.available(),
    }
    note = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}; all variants in turn."
    values = {**about, **found, "table": table(found, MODELS[arguments.model][0], note)}
    RESULTS.mkdir(exist_ok=True)
    name = "serving_engine" if arguments.model == "random" else f"serving_engine_{arguments.model}"
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

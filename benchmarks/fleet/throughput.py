"""One step for the adapters of many users at once, against one step after the other in PEFT, ratios within one run.

LoRA-XS, rank 16, all linear layers; the model inside modicum and a random Llama of 110M parameters (hidden 768, 12
layers). All rows have as many tokens. A step is forward, backward, clipping and AdamW. "PEFT" is a model of PEFT's with
our method on it and PyTorch's AdamW: one adapter, used again for every user, which is as fast as PEFT can be without
loading and saving. Steps of all variants are taken in turn.

With --method lora the same of LoRA, of which a user has far more numbers, on the smaller model.

    python benchmarks/fleet/throughput.py [--threads 4] [--repeats 5] [--method lora] [--small] [--only embedded]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum import LoraXSConfig
from modicum.data.encoded import Collator, Encoded, EncodedRow
from modicum.evaluate.memory import Peak
from modicum.fleet.base import fleet_base
from modicum.fleet.cohort import Cohort
from modicum.fleet.passes import Pass
from modicum.fleet.spec import make_fleet
from modicum.models.loading import load_base, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.fleet.base import FleetBase

RESULTS = Path(__file__).parent / "results"
RANK = 16
USERS = 64
#: rows of each user in a step, and tokens of a row: the shorter, the more a step of its own wastes
CASES = ((1, 8), (8, 8), (1, 16))
RATE, CLIP = 1e-3, 1.0
#: seconds of a step that is not taken 64 times in every turn: all are alike, so some of them stand for all
LONG = 0.125


def llama(small: bool) -> LlamaForCausalLM:
    """The random Llama: 110M parameters with its embedding of 32,000 words."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
    if not small:
        size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32_000}
    heads = 4 if small else 12
    config = LlamaConfig(
        **size,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def models(small: bool) -> dict[str, Callable[[], Any]]:
    return {
        "embedded": lambda: load_base("embedded", dtype="float32"),
        "llama-110m": lambda: llama(small),
    }


def rows(count: int, tokens: int, words: int) -> Encoded:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(5, words, (count, tokens), generator=generator).tolist()
    return Encoded([EncodedRow(row) for row in ids])


class Alone:
    """PEFT: one adapter that makes a step on some rows."""

    def __init__(self, model: Any, method: str) -> None:
        config = (
            LoraXSConfig(r=RANK) if method == "lora_xs" else LoraConfig(r=RANK, target_modules="all-linear")
        )
        self.model = get_peft_model(model, config).eval()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def step(self, data: Encoded, first: int, count: int) -> None:
        """Train on some rows."""
        batch = Collator(0)([data[row] for row in range(first, first + count)])
        self.model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Together:
    """A cohort: all users make a step, each on its own rows."""

    def __init__(self, base: FleetBase, data: Encoded, share: int) -> None:
        self.data = {
            user: Encoded([EncodedRow(data[user * share + row]["input_ids"]) for row in range(share)])
            for user in range(USERS)
        }
        self.turn = Pass(tuple(range(USERS)), tuple(tuple(range(share)) for _ in range(USERS)))
        self.cohort = Cohort(base, [RANK] * USERS)

    def step(self) -> None:
        """Train everybody."""
        self.cohort.step(self.turn, self.data, [RATE] * USERS, CLIP)


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def base_for(model: Any, method: str) -> FleetBase:
    values = {
        "model": {"name_or_path": "embedded"},
        "users": {"source": "unused"},
        "method": {"name": method, "r": RANK},
        "store": {"path": "unused"},
    }
    return fleet_base(model, load_tokenizer("embedded"), make_fleet(values))


def speed(make: Callable[[], Any], method: str, share: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step of all users: in a cohort, one user after the other, and of one adapter on all rows."""
    alone = Alone(make(), method)
    data = rows(USERS * share, tokens, alone.model.config.vocab_size)
    together = Together(base_for(make(), method), data, share)
    alone.step(data, 0, share)
    once = timed(lambda: alone.step(data, 0, share))
    sampled = USERS if once * USERS < LONG * USERS else max(8, USERS // 4)

    def sequential() -> None:
        for user in range(sampled):
            alone.step(data, user * share, share)

    variants = {
        "cohort": together.step,
        "one adapter, all rows": lambda: alone.step(data, 0, USERS * share),
        "sequential": sequential,
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            seconds = timed(call)
            if turn:
                times[name].append(seconds * (USERS / sampled if name == "sequential" else 1))
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "seconds": times,
        "sequential_steps_timed": sampled,
        "cohort_seconds": middle["cohort"],
        "adapters_per_hour_against_sequential": middle["sequential"] / middle["cohort"],
        "time_against_one_adapter": middle["cohort"] / middle["one adapter, all rows"],
        "user_steps_per_hour": 3600 * USERS / middle["cohort"],
    }


def memory(make: Callable[[], Any], method: str, share: int, tokens: int) -> dict[str, Any]:
    """The most bytes that tensors hold in two steps, beside the base model: of a cohort, and of one adapter."""
    alone = Alone(make(), method)
    data = rows(USERS * share, tokens, alone.model.config.vocab_size)
    own = sum(p.numel() for p in alone.trained)
    with Peak(torch.device("cpu")) as one:
        for _ in range(2):
            alone.step(data, 0, USERS * share)
    base = base_for(make(), method)
    assert base.widest.record.layout.size == own
    with Peak(torch.device("cpu")) as many:
        together = Together(base, data, share)
        for _ in range(2):
            together.step()
    # one adapter's numbers were there before it was measured, those of the cohort were not
    beyond = many.bytes - (one.bytes + 4 * own)
    allowed = 12 * own * USERS
    return {
        "numbers_per_adapter": own,
        "one_adapter_bytes": one.bytes + 4 * own,
        "cohort_bytes": many.bytes,
        "beyond_one_adapter_bytes": beyond,
        "allowed_bytes": allowed,
        "bytes_per_number_and_user": beyond / (own * USERS),
        "of_allowed": beyond / allowed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--method", choices=("lora_xs", "lora"), default="lora_xs")
    parser.add_argument("--small", action="store_true", help="a small Llama, nothing written")
    parser.add_argument("--only", choices=("embedded", "llama-110m"), help="one model, nothing written")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    method = arguments.method
    for name, make in models(arguments.small).items():
        if arguments.only not in (None, name) or (method == "lora" and name != "embedded"):
            continue
        for share, tokens in CASES if method == "lora_xs" else CASES[:1]:
            case = f"{name}, {share} row{'s' if share > 1 else ''} of {tokens} tokens a user"
            # the larger model takes long steps on all rows
            repeats = (
                arguments.repeats if (name, share) != ("llama-110m", 8) else max(3, arguments.repeats // 2)
            )
            found[case] = {
                **speed(make, method, share, tokens, repeats),
                "memory": memory(make, method, share, tokens),
            }
            print(json.dumps({case: found[case]}, indent=1), flush=True)
            gc.collect()
    if arguments.small or arguments.only:
        return
    about = {
        "what": f"a training step for {USERS} users at once against {USERS} steps in PEFT",
        "command": f"python benchmarks/fleet/throughput.py --threads {arguments.threads} "
        f"--repeats {arguments.repeats} --method {method}",
        "method": method,
        "versions": {name: version(name) for name in ("modicum", "torch", "peft", "transformers")},
        "threads": arguments.threads,
    }
    values = {**about, "cases": found, "table": table(found, method, arguments.threads)}
    RESULTS.mkdir(exist_ok=True)
    name = "fleet_throughput" if method == "lora_xs" else "fleet_throughput_lora"
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def table(found: dict[str, Any], method: str, threads: int) -> dict[str, Any]:
    lines = [
        [
            case,
            f"{1000 * one['cohort_seconds']:,.0f}",
            f"{one['adapters_per_hour_against_sequential']:.2f}",
            f"{one['time_against_one_adapter']:.3f}",
            f"{one['memory']['numbers_per_adapter']:,}",
            f"{one['memory']['bytes_per_number_and_user']:.2f}",
        ]
        for case, one in found.items()
    ]
    shown = {"lora_xs": "LoRA-XS", "lora": "LoRA"}[method]
    return {
        "columns": [
            "model and rows",
            "step of 64 users, ms",
            "× PEFT, one after the other",
            "time against one adapter, all rows",
            "numbers of a user",
            "bytes per number and user",
        ],
        "rows": lines,
        "note": f"{shown}, rank {RANK}, all linear layers, float32, {USERS} users. Bytes are "
        "those beyond one adapter on the same rows, at the peak of a step; with held-out rows the best numbers so far "
        f"are kept, which takes 4 more. Where a step of PEFT takes longer than {1000 * LONG:.0f} ms, 16 of the {USERS} "
        "are timed and stand for all. "
        f"Threads: {threads}; all variants in turn, medians.",
    }


if __name__ == "__main__":
    main()

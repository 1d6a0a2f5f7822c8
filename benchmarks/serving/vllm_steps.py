"""One decoding step of vLLM on a processor, of vLLM with adapters, and of the embedded engine; one core, in turn.

A random Llama (hidden 768, 12 layers). Each arm is a process of its own: vLLM alone; vLLM with our plug-in, asked for
the base model and for 64 different LoRA-XS adapters; vLLM's own LoRA with as many LoRAs of the same rank; the embedded
engine. Sequences begin with prompts of the given length, found in the prefix cache from the second turn on, and go on
for some tokens; a step is the difference between long and short answers, divided by the tokens between them.

    python benchmarks/serving/vllm_steps.py --vllm PYTHON-WITH-VLLM [--context 200] [--batch 32 64] [--rounds 3]
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

RESULT = Path(__file__).parent / "results" / "serving_vllm.json"
RANK, ADAPTERS, SHORT, LONG = 16, 64, 4, 20
VOCABULARY = 4096
#: arm -> (environment, what its batches are named in the table)
ARMS = {
    "vLLM": ("vllm", ("base",)),
    "vLLM, plug-in": ("vllm", ("base", "LoRA-XS")),
    "vLLM, own LoRA": ("vllm", ("LoRA",)),
    "embedded": ("modicum", ("base", "LoRA-XS")),
}
#: what takes seconds per step is done once
SLOW = "LoRA"


def arm(name: str, folder: str, dtype: str) -> None:
    """Runs in a process of its own: lines of JSON with batch, context, tokens and kind in, seconds out."""
    answer = _embedded(folder, dtype) if name == "embedded" else _vllm(name, folder, dtype)
    print("READY", flush=True)
    for line in sys.stdin:
        print("SECONDS " + json.dumps(answer(json.loads(line))), flush=True)
    # neither engine is asked to end in order
    os._exit(0)


def prompts(batch: int, context: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(10, VOCABULARY, (batch, context)).tolist()


def _embedded(folder: str, dtype: str) -> Any:
    from modicum.serve.engine.embedded import open_engine
    from modicum.serve.engine.interface import Request, Sampling
    from modicum.serve.settings import EngineSettings
    from modicum.store import Store

    settings = EngineSettings(
        f"{folder}/model", dtype=dtype, max_batch=64, max_batch_tokens=512, cache_tokens=35200, slots=ADAPTERS,
        max_rank=RANK,
    )  # fmt: skip
    engine, _ = open_engine(settings, Store(f"{folder}/store"))
    engine.start()
    loop = asyncio.new_event_loop()

    async def one(prompt: list[int], tokens: int, version: str | None) -> None:
        sampling = Sampling(tokens, temperature=0.0, ignore_eos=True)
        async for _ in engine.generate(Request(tuple(prompt), sampling, version)):
            pass

    async def batch(asked: dict) -> float:
        given = prompts(asked["batch"], asked["context"])
        names = [f"user-{n % ADAPTERS}@1" if asked["kind"] == "LoRA-XS" else None for n in range(len(given))]
        start = time.perf_counter()
        await asyncio.gather(*(one(p, asked["tokens"], v) for p, v in zip(given, names, strict=True)))
        return time.perf_counter() - start

    return lambda asked: loop.run_until_complete(batch(asked))


def _vllm(name: str, folder: str, dtype: str) -> Any:
    if name == "vLLM, plug-in":
        os.environ["MODICUM_VLLM_STORE"] = f"{folder}/store"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if name != "vLLM":
        # the head has no adapters, and vLLM would multiply by zeros there
        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        options = {
            "enable_lora": True, "max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS, "max_lora_rank": RANK,
            "lora_target_modules": linears,
        }  # fmt: skip
    llm = LLM(
        model=f"{folder}/model", skip_tokenizer_init=True, dtype=dtype, max_model_len=512, max_num_seqs=64,
        max_num_batched_tokens=512, block_size=32, num_gpu_blocks_override=1100, enable_prefix_caching=True,
        enforce_eager=True, **options,
    )  # fmt: skip

    known: dict[str, Any] = {}

    def lora(n: int, kind: str) -> Any:
        if kind == "LoRA-XS":
            from modicum.serve.vllm.plugin import asked
            from modicum.store import Store

            version = f"user-{n % ADAPTERS}@1"
            if version not in known:
                known[version] = asked(version, Store(f"{folder}/store").get(version))
            return known[version]
        return (
            LoRARequest(f"lora-{n}", n % ADAPTERS + 1, f"{folder}/loras/{n % ADAPTERS}")
            if kind == "LoRA"
            else None
        )

    def batch(asked: dict) -> float:
        given = [TokensPrompt(prompt_token_ids=p) for p in prompts(asked["batch"], asked["context"])]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        requests = [lora(n, asked["kind"]) for n in range(len(given))]
        start = time.perf_counter()
        llm.generate(given, sampling, lora_request=requests if requests[0] else None, use_tqdm=False)
        return time.perf_counter() - start

    return batch


class Arm:
    """A process that answers with seconds."""

    def __init__(self, name: str, python: str, folder: Path, given: argparse.Namespace) -> None:
        core = str(given.core)
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": core,
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, __file__, "--arm", name, str(folder), given.dtype],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip

    def ready(self) -> None:
        """Returns when steps can be asked for."""
        self._until("READY")

    def step(self, batch: int, context: int, kind: str) -> float:
        """Seconds of one step."""
        found = []
        for tokens in (SHORT, LONG):
            assert self._process.stdin is not None
            asked = {"batch": batch, "context": context, "tokens": tokens, "kind": kind}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            found.append(json.loads(self._until("SECONDS ")))
        return (found[1] - found[0]) / (LONG - SHORT)

    def end(self) -> None:
        """Returns when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _until(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"the process of an arm ended: {self.log.read_text()[-3000:]}")


def loras(folder: Path, model: str, count: int) -> None:
    """PEFT folders with LoRAs on all linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from modicum.models.loading import load_base

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load_base(model, dtype="float32"), config)
    for n in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.02)
        adapted.save_pretrained(folder / str(n))


def measure(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Seconds of steps by batch and arm."""
    sys.path.insert(0, str(Path(__file__).parent))
    from stored import fill, random_llama

    model = str(random_llama(folder / "model", small=given.small))
    fill(folder / "store", model, ADAPTERS, RANK)
    loras(folder / "loras", model, ADAPTERS)
    arms = {
        name: Arm(name, given.vllm if where == "vllm" else sys.executable, folder, given)
        for name, (where, _) in ARMS.items()
        if name not in given.without
    }
    for one in arms.values():
        one.ready()
    found: dict[str, dict[str, list[float]]] = {}
    for batch in given.batch:
        steps = found.setdefault(f"batch {batch}", {})
        for turn in range(given.rounds + 1):
            for name, one in arms.items():
                for kind in ARMS[name][1]:
                    if kind == SLOW and turn > 1:
                        continue
                    seconds = one.step(batch, given.context, kind)
                    if turn:  # the first turn warms up
                        steps.setdefault(f"{name}: {kind}", []).append(seconds)
        told = {name: round(1e3 * statistics.median(values), 1) for name, values in steps.items()}
        print(f"batch {batch}, ms: {told}", file=sys.stderr)
    for one in arms.values():
        one.end()
    return found


def table(found: dict[str, dict[str, list[float]]], given: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for batch, steps in found.items():
        base = statistics.median(steps["vLLM: base"])
        for name, values in steps.items():
            own = steps.get(name.partition(":")[0] + ": base", steps["vLLM: base"])
            pairs = zip(own, values, strict=False)
            ratio = statistics.median([one / other for one, other in pairs])
            seconds = statistics.median(values)
            rows.append([batch, name, f"{1e3 * seconds:.1f}", f"{base / seconds:.2f}", f"{ratio:.3f}"])
    return {
        "columns": ["", "engine: adapters", "step, ms", "speed ÷ vLLM's base", "speed ÷ own base"],
        "rows": rows,
        "note": f"Decoding behind {given.context} tokens, random Llama (hidden 768, 12 layers), {given.dtype}, one core, "  # noqa: E501
        f"{ADAPTERS} different adapters of rank {RANK} on all linear layers, processes in turn, medians. vLLM 0.32 on "
        "processors (vllm-cpu), not compiled; its own LoRA once, against vLLM without LoRA.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vllm", help="a Python with vLLM and modicum", default=os.environ.get("MODICUM_VLLM_PYTHON")
    )
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--without", nargs="*", default=[], choices=tuple(ARMS))
    parser.add_argument("--small", action="store_true", help="a small model, nothing written")
    parser.add_argument("--arm", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        arm(*given.arm)
        return
    if not given.vllm:
        raise SystemExit("name a Python that has vLLM with --vllm; docs/do/scale-out.md says how to make one")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    result = {
        "what": "a decoding step of vLLM and of the embedded engine",
        "command": f"python benchmarks/serving/vllm_steps.py --vllm PYTHON --context {given.context} --batch "
        f"{' '.join(map(str, given.batch))} --dtype {given.dtype}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers")},
        "seconds": found,
        "table": table(found, given),
    }
    print(json.dumps(result["table"], indent=1))
    if not given.small:
        name = RESULT if given.dtype == "bfloat16" else RESULT.with_name(f"serving_vllm_{given.dtype}.json")
        name.parent.mkdir(exist_ok=True)
        name.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

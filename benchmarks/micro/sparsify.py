"""Time, memory and kept zeros of Wanda followed by masked GPTQ on one large layer.

A 4096 x 11008 weight (the down projection of a 7B Llama: 11008 inputs) on inputs of a decaying spectrum. Half of it
goes, by Wanda unstructured and 2:4, or by magnitude over the whole layer; then 4 bits in groups of 128 by GPTQ with
the mask, integer zero-points and float32 offsets. Norms, mask, Hessian and GPTQ are timed apart, in wall and
processor time; the growth of the process's peak memory stands beside each step. GPTQ of the same weight without the
mask shows how many zeros it would lose.

    python benchmarks/micro/sparsify.py [--threads 2] [--rows 8192] [--out 4096] [--in 11008]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum import __version__
from modicum.ops.affine import decode
from modicum.ops.gptq import Hessian, Quantized, gptq
from modicum.ops.sparsity import InputNorms, magnitude_scores, mask, mask_n_m, wanda_scores

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "sparsify.json"
BITS, GROUP, RATIO = 4, 128, 0.5


def peak() -> float:
    """The largest amount of memory that the process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu, before = time.perf_counter(), time.process_time(), peak()
    value = call()
    return value, {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak growth, MiB": peak() - before,
    }


def layer(out: int, inner: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inner, generator=generator) * 0.02
    rank = min(1024, inner // 2)
    mix = torch.randn(rank, inner, generator=generator) * (torch.arange(rank) + 1.0).pow(-0.5).unsqueeze(1)
    x = torch.randn(rows, rank, generator=generator) @ mix
    x += 0.3 * torch.randn(rows, inner, generator=generator)
    # inputs of real layers differ in size, which is what Wanda lives on
    return weight, x * torch.randn(inner, generator=generator).exp()


def loss(weight: torch.Tensor, value: torch.Tensor, x: torch.Tensor) -> float:
    """‖(W − Ŵ) X‖ / ‖W X‖ on the first inputs."""
    x = x[:1024]
    return float(((weight - value) @ x.T).norm() / (weight @ x.T).norm())


def added(accumulator: Any, x: torch.Tensor) -> Any:
    for part in x.split(512):
        accumulator.add(part)
    return accumulator


def measure(options: argparse.Namespace) -> dict[str, Any]:
    weight, x = layer(options.out, options.inner, options.rows)
    start = peak()
    inputs, norms = measured(lambda: added(InputNorms(options.inner), x))
    masks = {
        "wanda": lambda: mask(wanda_scores(weight, inputs.norms()), RATIO),
        "wanda 2:4": lambda: mask_n_m(wanda_scores(weight, inputs.norms()), 2, 4),
        "magnitude": lambda: mask(magnitude_scores(weight), RATIO, "layer"),
    }
    rows: dict[str, dict[str, Any]] = {}
    keeps = {}
    for name, call in masks.items():
        keeps[name], spent = measured(call)
        share = 1 - float(keeps[name].float().mean())
        rows[name] = {"mask": spent, "zeros": share} | ({} if name == "magnitude" else {"norms": norms})
        rows[name]["loss of zeros"] = loss(weight, weight * keeps[name], x)
    hessian, summed = measured(lambda: added(Hessian(options.inner), x).matrix())

    def quantized(w: torch.Tensor, keep: torch.Tensor | None) -> Quantized:
        return gptq(w, hessian, BITS, (1, GROUP), zero_point="integer", offset_dtype=torch.float32, mask=keep)

    for name in ("wanda", "wanda 2:4", "wanda, GPTQ without the mask"):
        keep = keeps[name.partition(",")[0]]
        row = rows.setdefault(name, {})
        inner = keep if "," not in name else None
        found, row["gptq"] = measured(lambda keep=keep, inner=inner: quantized(weight * keep, inner))
        value = decode(found.codes, found.grid, BITS, (1, GROUP))
        row["zeros kept"] = float((value[~keep] == 0).double().mean())
        row["loss"] = loss(weight, value, x)
        row["hessian"] = summed
    return {"steps": rows, "peak": {"inputs, MiB": start, "in all, MiB": peak()}}


def shown(found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The documentation's table."""

    def cell(row: dict[str, Any], what: str) -> str:
        return f"{row[what]['wall']:.2f} ({row[what]['cpu']:.2f})" if what in row else "–"

    def number(row: dict[str, Any], what: str, form: str) -> str:
        return format(row[what], form) if what in row else "–"

    steps = ("norms", "mask", "hessian", "gptq")
    numbers = (("loss of zeros", ".4f"), ("loss", ".4f"), ("zeros kept", ".2%"))
    return {
        "columns": [
            "", *(f"{step}, s (CPU s)" for step in steps), "error of the zeros", "error with 4 bits", "zeros kept",
        ],
        "rows": [
            [name, *(cell(row, step) for step in steps), *(number(row, *pair) for pair in numbers)]
            for name, row in found["steps"].items()
        ],
        "note": f"{options.out} x {options.inner} weight, half of it zero, then GPTQ in {BITS} bits in groups of "
        f"{GROUP}, integer zero-points; {options.rows:,} calibration rows, float32, {options.threads} threads. Errors "
        f"are those of the outputs, relative. Peak memory {found['peak']['in all, MiB']:,.0f} MiB, of which weight, "
        f"inputs and libraries take {found['peak']['inputs, MiB']:,.0f} MiB. The machine is shared with other work, "
        "so compare processor time.",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", dest="inner", type=int, default=11008)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options)
    result = {
        "what": f"Wanda and masked GPTQ of a {options.out} x {options.inner} weight, {options.rows} rows",
        "command": f"python benchmarks/micro/sparsify.py --threads {options.threads} --rows {options.rows}",
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {"modicum": __version__, "torch": torch.__version__},
        **found,
        "table": shown(found, options),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""Time and loss of GPTQ on one large layer: ours, the published loop, and GPTQModel where it is installed.

A 4096 x 11008 weight (the down projection of a 7B Llama transposed: 11008 inputs), 4 bits in groups of 128,
calibrated on inputs of a decaying spectrum. The Hessian, its factor and the loop over the columns are timed apart,
in wall and processor time. Rounding to nearest and the loss of each on the same Hessian stand beside.

    python benchmarks/micro/gptq.py [--threads 2] [--rows 8192] [--out 4096] [--in 11008] [--gptqmodel PYTHON]

`--gptqmodel` names the Python of another environment that has GPTQModel.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum import __version__
from modicum.ops.affine import decode, encode, fit_grid
from modicum.ops.gptq import Hessian, gptq

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "gptq.json"
BITS, GROUP = 4, 128

#: run by the other environment: GPTQModel's quantizer on the same weight and inputs
THEIRS = """
import json, sys, time, torch, gptqmodel
torch.set_num_threads(int(sys.argv[2]))
from gptqmodel.quantization import GPTQ, QuantizeConfig
data = torch.load(sys.argv[1])
layer = torch.nn.Linear(data["weight"].shape[1], data["weight"].shape[0], bias=False)
layer.weight.data = data["weight"]
task = GPTQ(layer, QuantizeConfig(bits=4, group_size=128, sym=False, desc_act=False, act_group_aware=False))
task.quantizer.configure(perchannel=True)
def clock(call):
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
def add():
    for part in data["x"].split(512):
        task.add_batch(part, None)
_, hessian = clock(add)
result, loop = clock(task.quantize)
torch.save(result[0].float(), sys.argv[1] + ".out")
versions = {"gptqmodel": gptqmodel.__version__, "torch": torch.__version__}
print(json.dumps({"hessian": hessian, "quantize": loop, "versions": versions}))
"""


def clocked(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def layer(out: int, inner: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inner, generator=generator) * 0.02
    rank = min(1024, inner // 2)
    mix = torch.randn(rank, inner, generator=generator) * (torch.arange(rank) + 1.0).pow(-0.5).unsqueeze(1)
    x = torch.randn(rows, rank, generator=generator) @ mix + 0.3 * torch.randn(
        rows, inner, generator=generator
    )
    return weight, x


def loss(weight: torch.Tensor, value: torch.Tensor, x: torch.Tensor) -> float:
    """‖(W − Ŵ) X‖ / ‖W X‖ on the first inputs."""
    x = x[:1024]
    return float(((weight - value) @ x.T).norm() / (weight @ x.T).norm())


def published(weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The loop of the paper's own code: inverse Hessian, errors pushed column by column, float32; Ŵ."""
    w, damp = weight.clone(), 0.01 * float(h.diagonal().mean())
    h = h.clone()
    h.diagonal().add_(damp)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    value = torch.zeros_like(w)
    for start in range(0, w.shape[1], GROUP):
        end = min(start + GROUP, w.shape[1])
        part, errors = w[:, start:end].clone(), torch.zeros(w.shape[0], end - start)
        low, high = part.amin(1), part.amax(1)
        scale = (high - low) / (2**BITS - 1)
        for index in range(end - start):
            column = part[:, index]
            rounded = ((column - low) / scale).round().clamp(0, 2**BITS - 1) * scale + low
            errors[:, index] = (column - rounded) / factor[start + index, start + index]
            part[:, index:] -= (
                errors[:, index : index + 1] @ factor[start + index : start + index + 1, start + index : end]
            )
            value[:, start + index] = rounded
        w[:, end:] -= errors @ factor[start:end, end:]
    return value


def gptqmodel(python: str, weight: torch.Tensor, x: torch.Tensor, threads: int) -> dict:
    """Times of GPTQModel in its own environment, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "data.pt")
        torch.save({"weight": weight, "x": x}, file)
        done = subprocess.run(
            [python, "-c", THEIRS, file, str(threads)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"missing": (done.stderr.strip().splitlines() or ["failed"])[-1]}
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return {**found, "loss": loss(weight, torch.load(file + ".out"), x)}


def measure(options: argparse.Namespace) -> dict:
    weight, x = layer(options.out, options.inner, options.rows)
    hessian = Hessian(options.inner)

    def add() -> torch.Tensor:
        for part in x.split(512):
            hessian.add(part)
        return hessian.matrix()

    h, summed = clocked(add)
    grid, rounding = clocked(lambda: fit_grid(weight, BITS, (1, GROUP)))
    rounded = decode(encode(weight, grid, BITS, (1, GROUP)), grid, BITS, (1, GROUP))
    rows: dict[str, dict] = {"round to nearest": {"quantize": rounding, "loss": loss(weight, rounded, x)}}
    for name, more in {
        "modicum": {},
        "modicum, act order": {"act_order": True},
        "modicum, clip mse": {"clip": "mse"},
    }.items():
        found, spent = clocked(lambda more=more: gptq(weight, h, BITS, (1, GROUP), **more))
        value = decode(found.codes, found.grid, BITS, (1, GROUP))
        rows[name] = {"hessian": summed, "quantize": spent, "loss": loss(weight, value, x)}
    value, spent = clocked(lambda: published(weight, h))
    rows["published loop"] = {"quantize": spent, "loss": loss(weight, value, x)}
    if options.gptqmodel:
        rows["GPTQModel"] = gptqmodel(options.gptqmodel, weight, x, options.threads)
    else:
        rows["GPTQModel"] = {"missing": options.why}
    return rows


def shown(rows: dict, options: argparse.Namespace) -> dict:
    """The documentation's table."""

    def cell(row: dict, what: str) -> str:
        return f"{row[what]['wall']:.1f} ({row[what]['cpu']:.1f})" if what in row else "–"

    return {
        "columns": ["", "Hessian, s (CPU s)", "factor and columns, s (CPU s)", "relative output error"],
        "rows": [
            [name, cell(row, "hessian"), cell(row, "quantize"), f"{row['loss']:.4f}"]
            for name, row in rows.items()
            if "loss" in row
        ],
        "note": f"{options.out} x {options.inner} weight, 4 bits, groups of 128, {options.rows:,} calibration rows, "
        f"float32, {options.threads} threads; a machine shared with other work, so compare processor time.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", dest="inner", type=int, default=11008)
    parser.add_argument("--gptqmodel", help="a Python that has GPTQModel")
    parser.add_argument("--why", default="not asked for", help="why there is no GPTQModel, for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    result = {
        "what": f"GPTQ of a {options.out} x {options.inner} weight, 4 bits, groups of 128, {options.rows} rows",
        "command": f"python benchmarks/micro/gptq.py --threads {options.threads} --rows {options.rows}",
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {"modicum": __version__, "torch": torch.__version__},
        "methods": rows,
        "table": shown(rows, options),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

"""Truncated decompositions side by side in one run: time, captured energy, angle to the true directions.

Writes `benchmarks/micro/results/basis.json`. Times are CPU seconds of one thread, which other work on the
machine disturbs least; wall seconds stand beside them. Ratios compare medians of the same run. Run it as
`python benchmarks/micro/basis.py`, `--small` for a trial on small matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sklearn
import torch
from sklearn.decomposition import TruncatedSVD
from threadpoolctl import threadpool_limits

from modicum.ops.lowrank import captured_energy, largest_principal_angle, left_singular_vectors, schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

THREADS = 1
RESULTS = Path(__file__).parent / "results" / "basis.json"
RANKS = (16, 64)


def matrix(out: int, into: int, spectrum: str, seed: int = 1) -> Tensor:
    """A test weight: `flat` is Gaussian noise, `real_like` adds four large directions and a power-law tail."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out, into, generator=generator) / into**0.5
    if spectrum == "flat":
        return noise
    k = 256
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator))[0] for n in (out, into))
    tail = 8 * (torch.arange(1, k - 3) + 2.0) ** -0.4
    return 0.7 * noise + (left * torch.cat([torch.tensor([30.0, 18.0, 12.0, 9.0]), tail])) @ right.T


def timed(run: Callable[[], Any], repeats: int) -> tuple[dict[str, Any], Any]:
    """(times, last result) of `repeats` runs after one warm-up; a single repeat is run without."""
    if repeats > 1:
        run()
    cpu, wall, result = [], [], None
    for _ in range(repeats):
        started = time.process_time(), time.perf_counter()
        result = run()
        cpu.append(time.process_time() - started[0])
        wall.append(time.perf_counter() - started[1])
    times = {
        "repeats": repeats,
        "cpu_s": round(statistics.median(cpu), 4),
        "cpu_min_s": round(min(cpu), 4),
        "cpu_max_s": round(max(cpu), 4),
        "wall_s": round(statistics.median(wall), 4),
    }
    return times, result


def sklearn_left(weight: Tensor, rank: int) -> Tensor:
    """Left singular vectors by scikit-learn's randomized solver: right ones of the transpose."""
    model = TruncatedSVD(n_components=rank, n_iter=10, random_state=0).fit(weight.numpy().T)
    return torch.from_numpy(np.ascontiguousarray(model.components_.T))


def gram_left(weight: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors and values from the float64 Gram matrix, for out <= in."""
    w = weight.double()
    values, vectors = torch.linalg.eigh(w @ w.T)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def case(out: int, into: int, spectrum: str) -> dict[str, Any]:
    """Every procedure on one matrix."""
    weight = matrix(out, into, spectrum)
    total = float(weight.double().square().sum())
    gram_times, (truth, values) = timed(lambda: gram_left(weight), 1)
    svd_times, svd = timed(lambda: torch.linalg.svd(weight, full_matrices=False), 1)
    rows = []
    for rank in RANKS:
        best = float(values[:rank].square().sum()) / total

        def row(name: str, times: dict[str, Any], u: Tensor, best: float = best, rank: int = rank) -> None:
            captured = captured_energy(weight, u.float())
            rows.append(
                {
                    "rank": rank,
                    "procedure": name,
                    **times,
                    "captured": captured,
                    "of_optimum": captured / best,
                    "largest_angle": largest_principal_angle(u.float(), truth[:, :rank]),
                }
            )

        def exact(rank: int = rank) -> Any:
            return left_singular_vectors(weight, rank, mode="exact")

        times, found = timed(lambda rank=rank: left_singular_vectors(weight, rank), 7)
        row("modicum fast", times, found.u)
        times, u = timed(lambda rank=rank: sklearn_left(weight, rank), 5)
        row("sklearn TruncatedSVD(n_iter=10)", times, u)
        torch.manual_seed(0)
        times, triple = timed(lambda rank=rank: torch.svd_lowrank(weight, q=rank, niter=10), 5)
        row("torch.svd_lowrank(niter=10)", times, triple[0])
        times, found = timed(exact, 3)
        row("modicum exact", times, found.u)
        row("torch.linalg.svd", svd_times, svd[0][:, :rank])
        row("eigh of the float64 Gram matrix", gram_times, truth[:, :rank])
    return {
        "shape": [out, into],
        "spectrum": spectrum,
        "smallest_relative_gap_in_top_64": float((1 - values[1:65] / values[:64]).min()),
        "rows": rows,
        "ratios": [ratios(rows, rank) for rank in RANKS],
    }


def ratios(rows: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """How many times faster, by CPU medians, and whether the energy is at least scikit-learn's."""
    at = {row["procedure"]: row for row in rows if row["rank"] == rank}
    fast, exact = at["modicum fast"], at["modicum exact"]
    full, other = at["torch.linalg.svd"], at["sklearn TruncatedSVD(n_iter=10)"]
    return {
        "rank": rank,
        "fast_over_sklearn": round(other["cpu_s"] / fast["cpu_s"], 2),
        "fast_over_svd_lowrank": round(at["torch.svd_lowrank(niter=10)"]["cpu_s"] / fast["cpu_s"], 2),
        "fast_over_svd": round(full["cpu_s"] / fast["cpu_s"], 1),
        "exact_over_svd": round(full["cpu_s"] / exact["cpu_s"], 2),
        "energy_at_least_sklearn": fast["captured"] >= other["captured"],
    }


def whole_model() -> dict[str, Any]:
    """All 84 matrices of a Llama with hidden 768, MLP 2048 and 12 layers, fast mode."""
    shapes = 4 * [(768, 768)] + 2 * [(2048, 768)] + [(768, 2048)]
    weights = [matrix(*shape, "flat", seed) for seed in range(12) for shape in shapes]
    result: dict[str, Any] = {"matrices": len(weights), "layers": 12, "hidden": 768, "mlp": 2048}
    for rank in (16, 32):
        times, _ = timed(lambda rank=rank: [left_singular_vectors(w, rank) for w in weights], 5)
        result[f"rank_{rank}"] = times
    return result


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """The documentation's table: CPU seconds, and captured energy relative to the optimum."""
    rows = []
    for found in report["cases"]:
        out, into = found["shape"]
        for rank in (16, 64):
            mine = {row["procedure"]: row for row in found["rows"] if row["rank"] == rank}
            cells = [f"{row['cpu_s']:.2f} ({row['of_optimum']:.3f})" for row in mine.values()]
            rows.append([f"{out} x {into}", found["spectrum"].replace("_", "-"), rank, *cells])
    whole = report["whole_model"]
    note = (
        f"CPU seconds on {report['threads']} thread (captured energy relative to the optimum), "
        f"{report['machine']}. All {whole['matrices']} matrices of a 110M Llama, fast: "
        f"{whole['rank_16']['cpu_s']:.2f} s at rank 16, {whole['rank_32']['cpu_s']:.2f} s at rank 32."
    )
    return {"columns": ["matrix", "spectrum", "rank", *mine], "rows": rows, "note": note}


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small matrices, nothing written")
    small = parser.parse_args().small
    torch.set_num_threads(THREADS)
    threadpool_limits(THREADS)
    shapes = [(700, 900)] if small else [(4096, 4096), (4096, 11008)]
    report: dict[str, Any] = {
        "what": "left singular vectors of one float32 weight; CPU seconds, one thread",
        "notes": [
            "torch.linalg.svd and the Gram eigendecomposition are run once, without warm-up: they take minutes",
            "they serve both ranks, and the float64 Gram matrix is the reference for optimum and angle",
            "on the flat spectrum neighbouring singular values differ by about 1e-4: directions are barely defined",
        ],
        "threads": THREADS,
        "schedule": {str(rank): schedule(rank) for rank in (16, 32, 64, 128)},
        "versions": {"torch": torch.__version__, "sklearn": sklearn.__version__, "numpy": np.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "whole_model": whole_model(),
        "cases": [],
    }
    print(json.dumps(report["whole_model"]))
    for shape in shapes:
        for spectrum in ("flat", "real_like"):
            report["cases"].append(case(*shape, spectrum))
            print(shape, spectrum, json.dumps(report["cases"][-1]["ratios"]), flush=True)
    report["load_average"] = [round(load, 1) for load in os.getloadavg()]
    report["table"] = shown(report)
    if not small:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

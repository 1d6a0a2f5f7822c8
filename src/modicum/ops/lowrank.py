"""Leading left singular vectors of a matrix, by a reproducible procedure.

Two procedures, both deterministic functions of the matrix. `fast` is block Krylov (block Lanczos with full
reorthogonalization) of a fixed depth from a fixed ±1 start; the depth depends on the shape alone, never on
a tolerance, so that two machines run the same polynomial and differ by rounding only. `exact` continues the
same iteration until every wanted direction has converged and then solves the projected problem in float64,
or decomposes the smaller Gram matrix in float64 where that is cheaper.

Source: Musco and Musco, arXiv 1504.05477 (block Krylov); Halko, Martinsson, Tropp, arXiv 0909.4061.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from modicum.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Mode = Literal["fast", "exact"]
Directions = Literal["top", "middle", "bottom"]

MODES: tuple[str, ...] = ("fast", "exact")
DIRECTIONS: tuple[str, ...] = ("top", "middle", "bottom")

# Part of the format: other values give another `fast` basis, and adapters refer to it.
_START_SEED = 0x6D6F6469
#: weight in the last Krylov block under which a direction counts as converged
_CONVERGED = 1e-3
#: singular values below this part of the largest carry rounding noise, no direction
_NEGLIGIBLE = 5e-6
#: below this smaller dimension the whole Gram matrix is cheaper than iterating to convergence
_SMALL = 1024


@dataclass(frozen=True)
class LeftFactors:
    """Left singular vectors and values of one matrix."""

    #: (out, rank) float32, orthonormal columns; the largest entry of each is positive
    u: Tensor
    #: (rank,) float32, descending
    s: Tensor
    #: ‖uᵀW‖² / ‖W‖² (Frobenius), 1 for a zero matrix
    captured: float
    #: whether every direction is accurate, not only the captured energy
    converged: bool
    #: Krylov blocks after the first, 0 when no iteration was needed
    iterations: int


@torch.no_grad()
def left_singular_vectors(
    weight: Tensor, rank: int, *, mode: Mode = "fast", directions: Directions = "top"
) -> LeftFactors:
    """The `rank` left singular vectors of the (out, in) `weight`, with their singular values.

    `top` are the largest, `bottom` the last of all min(out, in), `middle` those around the centre; the last
    two need `mode="exact"`. Directions that belong to no positive singular value (rank-deficient or zero
    weights) are completed to orthonormal columns in a fixed way.

    Raises:
        ConfigError: the rank exceeds min(out, in), the options contradict, or the weight is not finite.
    """
    _check(weight, rank, mode, directions)
    w, factor, total = _prepared(weight)
    small = min(w.shape)
    block, depth = schedule(w.shape[0], w.shape[1], rank)
    if total == 0.0:
        u, s, converged, steps = w.new_zeros(w.shape[0], rank), w.new_zeros(rank), True, 0
    elif directions != "top" or small <= 2 * block * (depth + 1) or (mode == "exact" and small <= _SMALL):
        u, s = _gram(w, rank, directions)
        converged, steps = True, 0
    elif mode == "fast":
        u, s, converged, steps = _Krylov(w, block).fixed(rank, depth)
    else:
        u, s, converged, steps = _Krylov(w, max(32, block)).until_converged(rank)
        if not converged:
            u, s = _gram(w, rank, directions)
            converged = True
    u = _finished(u, s, largest=_largest(w, s, directions))
    captured = float((s.double() * factor).square().sum() / total) if total else 1.0
    scaled = (s.double() * factor).to(torch.float32)
    return LeftFactors(u, scaled, min(captured, 1.0), converged, steps)


def schedule(out_features: int, in_features: int, rank: int) -> tuple[int, int]:
    """(block size, depth) of the `fast` procedure for a shape and rank: a part of the basis format."""
    small = min(out_features, in_features)
    block = 16 if rank <= 32 else 32 * math.ceil(rank / 64)
    # a flat spectrum needs a depth that grows slowly with the size and with the rank per block
    depth = 6 + 2 * (rank > block) + (small > 2048)
    return block, depth


@torch.no_grad()
def captured_energy(weight: Tensor, u: Tensor) -> float:
    """‖uᵀW‖² / ‖W‖² in the Frobenius norm, for `u` (out, k) with orthonormal columns; 1 for a zero weight."""
    w, _, _ = _prepared(weight)
    total = float(torch.linalg.vector_norm(w, dtype=torch.float64).square())
    part = float(torch.linalg.vector_norm(u.to(w.device, w.dtype).T @ w, dtype=torch.float64).square())
    return part / total if total else 1.0


@torch.no_grad()
def largest_principal_angle(a: Tensor, b: Tensor) -> float:
    """The largest angle, in radians, between the column spaces of `a` (n, k) and `b` (n, k or more).

    Both need orthonormal columns up to rounding; they are orthonormalised again in float64. Uses the sine,
    ‖(I − b bᵀ) a‖₂, below 45°, since the cosine loses half of the digits of a small angle.
    """
    qa, qb = (torch.linalg.qr(x.detach().to("cpu", torch.float64))[0] for x in (a, b))
    inside = qb.T @ qa
    sine = float(torch.linalg.matrix_norm(qa - qb @ inside, ord=2))
    if sine < math.sqrt(0.5):
        return math.asin(sine)
    return math.acos(min(1.0, float(torch.linalg.svdvals(inside)[-1])))


def _check(weight: Tensor, rank: int, mode: str, directions: str) -> None:
    faults = []
    if weight.ndim != 2:
        faults.append(f"the weight has {weight.ndim} dimensions, a basis is taken of a matrix (out, in)")
    elif not 1 <= rank <= min(weight.shape):
        faults.append(
            f"rank {rank} must lie between 1 and {min(weight.shape)} for a {tuple(weight.shape)} weight"
        )
    if mode not in MODES:
        faults.append(f"mode {mode!r} must be one of {', '.join(MODES)}")
    if directions not in DIRECTIONS:
        faults.append(f"directions {directions!r} must be one of {', '.join(DIRECTIONS)}")
    elif directions != "top" and mode == "fast":
        faults.append(
            f"{directions} directions need mode 'exact'; the fast procedure only finds the top ones"
        )
    if faults:
        raise ConfigError("; ".join(faults))


def _prepared(weight: Tensor) -> tuple[Tensor, float, float]:
    """The weight in float32 (scaled into a safe range), the factor taken out, and its squared norm."""
    w = weight.detach().to("cpu", torch.float32)
    if weight.dtype == torch.float64:
        peak = float(weight.detach().abs().max())
    else:
        low, high = torch.aminmax(w)
        peak = max(-float(low), float(high))
    if not math.isfinite(peak):
        raise ConfigError("the weight holds NaN or infinite values; there are no directions to take")
    factor = 1.0
    if peak and not 1e-6 < peak < 1e6:
        # squares of very small or large weights would leave float32's range
        factor = 2.0 ** math.floor(math.log2(peak))
        w = (weight.detach().to("cpu", torch.float64) / factor).to(torch.float32)
    total = float(torch.linalg.vector_norm(w)) ** 2 if peak else 0.0
    return w.contiguous(), factor, total * factor**2


@functools.lru_cache(maxsize=8)
def _start(rows: int, columns: int) -> Tensor:
    """The fixed ±1 start, (rows, columns) float32; the integer generator is the same on all platforms."""
    generator = torch.Generator().manual_seed(_START_SEED)
    return torch.randint(0, 2, (columns, rows), generator=generator).mul_(2).sub_(1).to(torch.float32).T


class _Krylov:
    """Block Krylov space of W Wᵀ started from W·(±1), with its image under Wᵀ."""

    def __init__(self, w: Tensor, block: int) -> None:
        self.w, self.block = w, block
        self.q = w.new_empty(w.shape[0], 0)
        self.z: list[Tensor] = []
        self.filled = 0

    def fixed(self, rank: int, depth: int) -> tuple[Tensor, Tensor, bool, int]:
        """(u, s, converged, steps) after exactly `depth` steps, fewer only when the space is exhausted."""
        block = self.block
        self.q = self.w.new_empty(self.w.shape[0], (depth + 1) * block)
        x: Tensor | None = self.w @ _start(self.w.shape[1], block)
        steps = 0
        for step in range(depth + 1):
            x = self._orthonormal(x)
            if x is None:
                break
            steps = step
            image = self._append(x)
            x = self.w @ image if step < depth else None
        z = torch.cat(self.z, dim=1)
        _, vectors = torch.linalg.eigh((z.T @ z).double())
        vectors = vectors.flip(1)[:, :rank]
        u = self.q[:, : self.filled] @ vectors.to(torch.float32)
        # roots of the small eigenvalues are noise of 1e-4 of the largest; the images' norms are not
        s = torch.linalg.vector_norm(z @ vectors.to(torch.float32), dim=0)
        tail = float(vectors[-block:].square().sum(0).sqrt().max())
        return _padded(u, rank), _pad_values(s, rank), tail < _CONVERGED or steps < depth, steps

    def until_converged(self, rank: int) -> tuple[Tensor, Tensor, bool, int]:
        """(u, s, converged, steps) iterated until the residuals of all `rank` directions reach rounding."""
        limit = min(self.w.shape) // 2
        self.q = self.w.new_empty(self.w.shape[0], limit + self.block)
        x: Tensor | None = self.w @ _start(self.w.shape[1], self.block)
        steps = -1
        while x is not None and self.filled + self.block <= limit:
            x = self._orthonormal(x)
            if x is None:
                break
            x = self.w @ self._append(x)
            steps += 1
            if self.filled >= 3 * rank and steps % 4 == 3 and self._residual(x, rank):
                u, s = self._refined(rank)
                return u, s, True, steps
        if x is None and self.filled:
            u, s = self._refined(rank)
            return u, s, True, max(steps, 0)
        return self.q[:, :rank], self.w.new_zeros(rank), False, steps

    def _append(self, x: Tensor) -> Tensor:
        image = self.w.T @ x
        self.q[:, self.filled : self.filled + x.shape[1]] = x
        self.filled += x.shape[1]
        self.z.append(image)
        return image

    def _orthonormal(self, x: Tensor | None) -> Tensor | None:
        """An orthonormal block orthogonal to the space so far, None when nothing is left."""
        if x is None or not float(x.abs().max()) > torch.finfo(torch.float32).tiny:
            return None
        done = self.q[:, : self.filled]
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            if self.filled:
                x = x - done @ (done.T @ x)
            x = _block_qr(x)
            if x is None:
                return None
        return x

    def _residual(self, x: Tensor, rank: int) -> bool:
        done = self.q[:, : self.filled]
        z = torch.cat(self.z, dim=1)
        values, vectors = torch.linalg.eigh((z.T @ z).double())
        rest = (x - done @ (done.T @ x)).double()
        wanted = vectors.flip(1)[-self.block :, :rank]
        return float((rest @ wanted).square().sum(0).sqrt().max()) < 1e-6 * float(values[-1])

    def _refined(self, rank: int) -> tuple[Tensor, Tensor]:
        """(u, s) from the projected problem in float64."""
        q = torch.linalg.qr(self.q[:, : self.filled].double())[0]
        gram = q.new_zeros(self.filled, self.filled)
        for part in self.w.split(1024, dim=1):  # no float64 copy of the whole weight
            image = part.double().T @ q
            gram.addmm_(image.T, image)
        values, vectors = torch.linalg.eigh(gram)
        u = q @ vectors.flip(1)[:, :rank]
        return _padded(u, rank), _root(values.flip(0)[:rank], rank)


def _block_qr(x: Tensor) -> Tensor | None:
    """`x` (n, b) with its columns orthonormalised in float64, back in float32; None when it vanishes."""
    norms = torch.linalg.vector_norm(x, dim=0, keepdim=True)
    if not float(norms.max()) > 0.0:
        return None
    y = (x / norms.max()).double()
    lower, failed = torch.linalg.cholesky_ex(y.T @ y)
    diagonal = lower.diagonal()
    if int(failed) or float(diagonal.min()) < 1e-6 * float(diagonal.max()):
        return torch.linalg.qr(y)[0].to(torch.float32)
    return torch.linalg.solve_triangular(lower, y.T, upper=False).T.to(torch.float32)


def _gram(w: Tensor, rank: int, directions: str) -> tuple[Tensor, Tensor]:
    """(u, s) from the float64 eigendecomposition of the smaller Gram matrix."""
    wide = w.shape[0] <= w.shape[1]
    small = min(w.shape)
    gram = torch.zeros(small, small, dtype=torch.float64)
    for part in w.split(1024, dim=1 if wide else 0):
        p = part.double()
        gram.addmm_(*((p, p.T) if wide else (p.T, p)))
    values, vectors = torch.linalg.eigh(gram)
    first = {"top": 0, "middle": (small - rank) // 2, "bottom": small - rank}[directions]
    chosen = slice(first, first + rank)
    s = _root(values.flip(0)[chosen], rank)
    found = vectors.flip(1)[:, chosen]
    if wide:
        return found, s
    image = torch.cat([part.double() @ found for part in w.split(1024)])
    return image / s.double().clamp_min(torch.finfo(torch.float32).tiny), s


def _largest(w: Tensor, s: Tensor, directions: str) -> float:
    """The largest singular value, or a bound within a small factor of it when `s` does not hold it."""
    return (
        float(s[0]) if directions == "top" else float(torch.linalg.vector_norm(w)) / math.sqrt(min(w.shape))
    )


def _root(values: Tensor, rank: int) -> Tensor:
    return _pad_values(values.clamp_min(0).sqrt(), rank).to(torch.float32)


def _pad_values(s: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(s, (0, rank - len(s)))


def _padded(u: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(u, (0, rank - u.shape[1]))


def _finished(u: Tensor, s: Tensor, largest: float) -> Tensor:
    """`u` (out, rank) in float32 with orthonormal columns and the canonical sign.

    Columns whose singular value is negligible are replaced by the fixed start made orthogonal to the others.
    """
    u = u.double()
    live = s > _NEGLIGIBLE * largest if largest > 0 else torch.zeros_like(s, dtype=torch.bool)
    kept, spare = u[:, live], int((~live).sum())
    q = _gram_schmidt(kept) if kept.shape[1] else kept
    if spare:
        fill = _start(u.shape[0], min(u.shape[0], 2 * spare + 8)).double()
        for _ in range(2):
            fill = fill - q @ (q.T @ fill)
        fill, _ = torch.linalg.qr(fill)
        for _ in range(2):
            fill = fill - q @ (q.T @ fill)
        fill = torch.linalg.svd(fill, full_matrices=False)[0][:, :spare]
        u = u.clone()
        u[:, live], u[:, ~live] = q, fill
    else:
        u = q
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    return (u * torch.where(peak < 0, -1.0, 1.0)).to(torch.float32).contiguous()


def _gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns nearest to the nearly orthonormal `u`, each prefix spanning the same space."""
    q, r = torch.linalg.qr(u)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)

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
#: residual of WᵀW v − s² v, relative to s², at which `exact` stops; for s far below the largest, to 1e-9 of its square
_RESIDUAL, _RESIDUAL_FLOOR = 1e-6, 1e-9


@dataclass(frozen=True)
class LeftFactors:
    """Left singular vectors and values of one matrix."""

    #: (out, rank) float32, orthonormal columns; the largest entry of each is positive
    u: Tensor
    #: (rank,) float32, descending
    s: Tensor
    #: ‖uᵀW‖² / ‖W‖² (Frobenius), 1 for a zero matrix; in `fast` mode a lower bound, Σ s² / ‖W‖², which
    #: is below it by the part of the last half step (under 1 % where the spectrum is flat)
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
    block, depth = schedule(rank)
    if total == 0.0:
        u, s, converged, steps = w.new_zeros(w.shape[0], rank), w.new_zeros(rank), True, 0
    elif directions != "top" or small <= 2 * block * (depth + 1) or (mode == "exact" and small <= _SMALL):
        u, s = _gram(w, rank, directions)
        converged, steps = True, 0
    elif mode == "fast":
        u, s, converged, steps = _Krylov(w, block, (depth + 1) * block).fixed(rank, depth)
    else:
        u, s, converged, steps = _Krylov(w, max(32, block), small // 2).until_converged(rank)
        if not converged:
            u, s = _gram(w, rank, directions)
            converged = True
    u = _finished(u, s, largest=_largest(w, s, directions))
    captured = float((s.double() * factor).square().sum() / total) if total else 1.0
    scaled = (s.double() * factor).to(torch.float32)
    return LeftFactors(u, scaled, min(captured, 1.0), converged, steps)


def schedule(rank: int) -> tuple[int, int]:
    """(block size, depth) of the `fast` procedure for a rank: a part of the basis format."""
    block = 16 if rank <= 32 else 32 * math.ceil(rank / 64)
    # the least depths whose energy on a flat spectrum reaches that of ten subspace iterations
    depth = 6 if rank <= block else 9 + (block == 16)
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
    # row by row: one float32 sum over millions of squares loses four digits
    total = float(torch.linalg.vector_norm(w, dim=1).double().square().sum())
    return w.contiguous(), factor, total * factor**2


@functools.lru_cache(maxsize=8)
def _start(rows: int, columns: int) -> Tensor:
    """The fixed ±1 start, (rows, columns) float32; the integer generator is the same on all platforms."""
    generator = torch.Generator().manual_seed(_START_SEED)
    return torch.randint(0, 2, (columns, rows), generator=generator).mul_(2).sub_(1).to(torch.float32).T


class _Krylov:
    """Block Krylov space V of WᵀW started from ±1, with its image W V; the image holds the left directions.

    Directions are rows here: skinny products run up to twice as fast in this layout.
    """

    def __init__(self, w: Tensor, block: int, limit: int) -> None:
        self.w, self.block = w, block
        self.v = w.new_empty(limit, w.shape[1])
        self.y = w.new_empty(limit, w.shape[0])
        self.filled = 0
        # both products of a step on one panel of rows while it is in the processor's cache
        rows = max(16, (1 << 19) // w.shape[1] // 16 * 16)
        self.panels = list(zip(range(0, w.shape[0], rows), w.split(rows), strict=True))

    def fixed(self, rank: int, depth: int) -> tuple[Tensor, Tensor, bool, int]:
        """(u, s, converged, steps) after exactly `depth` steps, fewer only when the space is exhausted."""
        x = self._orthonormal(_start(self.w.shape[1], self.block).T)
        steps = 0
        while x is not None and steps < depth:
            x = self._orthonormal(self._step(x))
            steps += x is not None
        if x is not None:
            torch.mm(x, self.w.T, out=self.y[self.filled : self.filled + len(x)])
            self.filled += len(x)
        y = self.y[: self.filled]
        _, vectors = torch.linalg.eigh((y @ y.T).double())
        vectors = vectors.flip(1)[:, :rank]
        u = y.T @ vectors.to(torch.float32)
        # roots of the small eigenvalues are noise of 1e-4 of the largest; the norms are not
        s = torch.linalg.vector_norm(u, dim=0)
        tail = float(torch.linalg.vector_norm(vectors[-self.block :], dim=0).max())
        return _padded(u, rank), _pad_values(s, rank), tail < _CONVERGED or x is None, steps

    def until_converged(self, rank: int) -> tuple[Tensor, Tensor, bool, int]:
        """(u, s, converged, steps) iterated until the residuals of all `rank` directions reach rounding."""
        x = self._orthonormal(_start(self.w.shape[1], self.block).T)
        steps, check = -1, 4 * rank
        while x is not None and self.filled + self.block <= len(self.v):
            image = self._step(x)
            steps += 1
            if self.filled >= check:
                if self._small_residual(image, rank):
                    return *self._refined(rank), True, steps
                check = self.filled + max(rank, self.filled // 4)
            x = self._orthonormal(image)
        if x is None:
            return *self._refined(rank), True, max(steps, 0)
        return self.y[:rank].T, self.w.new_zeros(rank), False, steps

    def _step(self, x: Tensor) -> Tensor:
        """WᵀW applied to the rows of `x`, which join the space."""
        end = self.filled + len(x)
        self.v[self.filled : end] = x
        image = x.new_zeros(x.shape)
        for first, panel in self.panels:
            part = x @ panel.T
            self.y[self.filled : end, first : first + len(panel)] = part
            image.addmm_(part, panel)
        self.filled = end
        return image

    def _orthonormal(self, x: Tensor) -> Tensor | None:
        """An orthonormal block orthogonal to the space so far, None when nothing is left."""
        block = _orthonormal_rows(x) if not self.filled else x
        done = self.v[: self.filled]
        for again in range(8 if self.filled else 0):
            if block is None:
                return None
            inside = block @ done.T
            block = _orthonormal_rows(torch.addmm(block, inside, done, alpha=-1))
            # twice is enough (Kahan, Parlett) unless the space is exhausted: then what the first projection
            # leaves is its own rounding, which lies inside again
            if again and float(inside.abs().max()) < 0.1:
                return block
        return None if self.filled else block

    def _small_residual(self, x: Tensor, rank: int) -> bool:
        """Whether WᵀW v − s² v is rounding noise for all wanted directions; `x` is WᵀW of the last block."""
        done, y = self.v[: self.filled], self.y[: self.filled]
        values, vectors = torch.linalg.eigh((y @ y.T).double())
        rest = torch.addmm(x, x @ done.T, done, alpha=-1).double()
        wanted = vectors.flip(1)[-self.block :, :rank]
        residual = torch.linalg.vector_norm(wanted.T @ rest, dim=1)
        allowed = (_RESIDUAL * values.flip(0)[:rank]).clamp_min(_RESIDUAL_FLOOR * float(values[-1]))
        return bool((residual <= allowed).all())

    def _refined(self, rank: int) -> tuple[Tensor, Tensor]:
        """(u, s) from the problem projected on the leading float32 directions, in float64."""
        y = self.y[: self.filled]
        _, vectors = torch.linalg.eigh((y @ y.T).double())
        # float32 mixes directions with close singular values; twice as many as wanted hold what was mixed in
        leading = vectors.flip(1)[:, : 2 * rank + 32]
        q = torch.linalg.qr(y.T.double() @ leading)[0]
        gram = q.new_zeros(q.shape[1], q.shape[1])
        for part in self.w.split(1024, dim=1):  # no float64 copy of the whole weight
            image = q.T @ part.double()
            gram.addmm_(image, image.T)
        values, vectors = torch.linalg.eigh(gram)
        u = q @ vectors.flip(1)[:, :rank]
        return _padded(u, rank), _root(values.flip(0)[:rank], rank)


def _orthonormal_rows(x: Tensor) -> Tensor | None:
    """`x` (b, n) with its rows orthonormalised in float64, back in float32; None when it vanishes."""
    norm = float(torch.linalg.vector_norm(x))
    if not norm > torch.finfo(torch.float32).tiny:
        return None
    y = (x / norm).double()
    lower, failed = torch.linalg.cholesky_ex(y @ y.T)
    diagonal = lower.diagonal()
    if int(failed) or float(diagonal.min()) < 1e-6 * float(diagonal.max()):
        return torch.linalg.qr(y.T)[0].T.to(torch.float32)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(y), dtype=torch.float64), upper=False)
    return (inverse @ y).to(torch.float32)


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
    if bool(live.all()):
        u = _gram_schmidt(u)
    else:
        u = u.clone()
        u[:, live] = _gram_schmidt(u[:, live])
        u[:, ~live] = _completion(u[:, live], int((~live).sum()))
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    return (u * torch.where(peak < 0, -1.0, 1.0)).to(torch.float32).contiguous()


def _completion(kept: Tensor, count: int) -> Tensor:
    """`count` orthonormal columns orthogonal to the orthonormal `kept`, the same for nearly the same `kept`.

    Taken in order from the fixed start and then from the unit vectors, among which enough always remain.
    """
    n, found = kept.shape[0], kept
    candidates = torch.cat(
        [_start(n, count + 8).double() / math.sqrt(n), torch.eye(n, dtype=kept.dtype)], dim=1
    )
    for x in candidates.T:
        rest = x - found @ (found.T @ x)
        norm = float(torch.linalg.vector_norm(rest))
        # a random direction keeps this part of its length on average; half of it is safely no noise
        if norm > 0.5 * math.sqrt((n - found.shape[1]) / n):
            rest = rest / norm
            rest = rest - found @ (found.T @ rest)
            found = torch.cat([found, (rest / torch.linalg.vector_norm(rest))[:, None]], dim=1)
        if found.shape[1] == kept.shape[1] + count:
            break
    return found[:, kept.shape[1] :]


def _gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns nearest to the nearly orthonormal `u`, each prefix spanning the same space."""
    if u.shape[1] == 0:
        return u
    q, r = torch.linalg.qr(u)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)

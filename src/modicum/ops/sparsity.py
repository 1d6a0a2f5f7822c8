"""Masks: which weights of a matrix stay when a share of them is set to zero.

A score says what a weight is worth; the lowest scores go. Magnitude scores are |W_jk|. Wanda's are

    S_jk = |W_jk| · ‖x_k‖₂

with the norm of input k over all calibration tokens, compared within each output row. Masks are True where a
weight is kept, and remove exact counts: of equal scores those with the lower index go first.

Source: Sun et al., arXiv 2306.11695 (Wanda); N:M patterns as in Mishra et al., arXiv 2104.08378.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from modicum.errors import ConfigError

Per = Literal["row", "layer"]

#: numbers that are looked at together, which bounds the working memory
_PANEL = 1 << 20


class InputNorms:
    """‖x_k‖₂ of each input of a layer over all its rows, batch after batch; a float64 vector is all it keeps."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        #: rows seen
        self.rows = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in the inputs x (…, in), in place."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.rows += x.shape[0]
        self._sum += x.square().sum(0, dtype=torch.float64)

    def norms(self) -> Tensor:
        """‖x_k‖₂, (in,) float32; zeros before any input."""
        return self._sum.sqrt().float()


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W|, (out, in) float32."""
    return weight.abs().float()


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_jk| · ‖x_k‖₂, (out, in) float32, of the `weight` (out, in) and the `norms` (in,) of its inputs."""
    return magnitude_scores(weight).mul_(norms.float())


def count(total: int, ratio: float) -> int:
    """How many of `total` weights the share `ratio` is: ⌊total · ratio⌋.

    Raises:
        ConfigError: the ratio is outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio = {ratio}, must be at least 0 and below 1")
    # 0.29 · 100 is a little less than 29 in binary
    return math.floor(round(total * ratio, 6))


@torch.no_grad()
def mask(scores: Tensor, ratio: float, per: Per = "row") -> Tensor:
    """What stays, (out, in) bool, when the lowest `ratio` of the non-negative `scores` (out, in) go.

    `per` "row" removes ⌊in · ratio⌋ of each row, "layer" ⌊out · in · ratio⌋ of the whole matrix.

    Raises:
        ConfigError: the ratio is outside [0, 1).
    """
    if per == "layer":
        return _of_layer(scores, count(scores.numel(), ratio))
    gone = count(scores.shape[1], ratio)
    if not gone:
        return torch.ones_like(scores, dtype=torch.bool)
    rows = max(_PANEL // scores.shape[1], 1)
    return torch.cat([_of_rows(panel, gone) for panel in scores.split(rows)])


@torch.no_grad()
def mask_n_m(scores: Tensor, n: int, m: int) -> Tensor:
    """What stays, (out, in) bool, when the `n` best of each `m` consecutive `scores` of a row are kept.

    2:4 keeps two of four and is what sparse tensor cores compute with; the share of zeros is 1 − n/m.

    Raises:
        ConfigError: n is not between 1 and m − 1, or m does not divide the row.
    """
    if not 1 <= n < m or scores.shape[1] % m:
        raise ConfigError(
            f"{n}:{m} of rows of {scores.shape[1]}: keep at least 1 and fewer than m of each m weights, and m has to "
            "divide the row"
        )
    rows = max(_PANEL // scores.shape[1], 1)
    return torch.cat([_of_runs(panel, n, m) for panel in scores.split(rows)])


def _of_rows(scores: Tensor, gone: int) -> Tensor:
    """The mask of a few rows without the `gone` lowest scores of each."""
    limit = scores.kthvalue(gone, dim=1, keepdim=True).values
    keep, equal = scores > limit, scores == limit
    # how many of those at the limit have to go: all but a few where scores differ
    going = gone - (~(keep | equal)).sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > going).any()):
        keep |= equal & (equal.cumsum(1) > going)
    return keep


def _of_layer(scores: Tensor, gone: int) -> Tensor:
    if not gone:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.float().flatten()
    limit = _smallest(flat, gone)
    keep, going = flat > limit, gone - int(torch.count_nonzero(flat < limit))
    for start in range(0, len(flat), _PANEL):
        equal = (flat[start : start + _PANEL] == limit).nonzero().squeeze(1)
        keep[start + equal[going:]] = True
        going = max(going - len(equal), 0)
    return keep.view_as(scores)


def _smallest(values: Tensor, k: int) -> Tensor:
    """The `k`-th smallest of the non-negative float32 `values` (n,), from 1.

    Such floats are in the order of their bits: the upper 16 are found by counting, and then the lower 16 among
    those that share them. A partial sort would copy a matrix with its indices.
    """
    bits, upper = values.view(torch.int32), 0
    for level in range(2):
        counts = torch.zeros(1 << 16, dtype=torch.int64, device=values.device)
        for panel in bits.split(_PANEL):
            half = panel >> 16 if level == 0 else panel[panel >> 16 == upper] & 0xFFFF
            counts += torch.bincount(half, minlength=1 << 16)
        half = int((counts.cumsum(0) < k).sum())
        k -= int(counts[:half].sum())
        upper = upper << 16 | half
    return torch.tensor(upper, dtype=torch.int32, device=values.device).view(torch.float32)


def _of_runs(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask of a few rows that keeps the `n` best of each run: those that fewer than n others beat."""
    runs = scores.reshape(-1, m).T.contiguous()
    keep = torch.empty_like(runs, dtype=torch.bool)
    for index, score in enumerate(runs):
        better = (runs[:index] > score).sum(0) + (runs[index + 1 :] >= score).sum(0)
        keep[index] = better < n
    return keep.T.reshape(scores.shape)

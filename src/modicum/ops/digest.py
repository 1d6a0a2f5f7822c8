"""Digests and sketches of weights: what identifies a base layer, and what compares two bases.

A digest is exact and tells bytes apart; it names a weight. A sketch is linear and tells directions apart up
to rounding; it names a basis, which two machines can only agree on approximately.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

#: numbers in a sketch
SKETCH_SIZE = 16
#: weights rounded and hashed at a time, so that no second copy of a large matrix is made
_CHUNK = 1 << 18


@torch.no_grad()
def weight_digest(weight: Tensor) -> str:
    """32 hex digits that identify the shape of `weight` and its values rounded to bfloat16.

    The same for a checkpoint loaded in float32 or bfloat16, on any device and in any memory layout. SHA-256,
    which current processors compute in hardware, cut to 16 bytes; −0 counts as 0.
    """
    state = hashlib.sha256(f"modicum weight {tuple(weight.shape)}\n".encode())
    flat = weight.detach()
    rows = max(1, _CHUNK // max(1, flat.shape[-1])) if flat.ndim > 1 else _CHUNK
    for part in flat.split(rows) if flat.numel() else ():
        rounded = part.to(torch.bfloat16).add_(0.0) if part.dtype != torch.bfloat16 else part + 0.0
        state.update(rounded.to("cpu").contiguous().view(torch.int16).numpy().data)
    return state.hexdigest()[:32]


@torch.no_grad()
def sketch(name: str, u: Tensor) -> Tensor:
    """The (16,) float64 sketch of the columns of `u` (n, k) under the layer name `name`.

    Entry j is Σ_k Σ_i g_jk(i) u_ik with g_jk(i) = ±1: fixed signs a_j, rolled by an amount that depends on
    (name, k), times signs that depend on (name, k). For one unit column each entry has mean 0 and variance 1,
    so turning the sign of a column moves the sketch by 2 (root mean square over j) up to a factor of about
    1 ± 0.2, and by exactly 2 for a column with one large entry. A column's part depends on no other column:
    the sketch of a prefix uses the same projections. Signs come from SHAKE-128, the same everywhere.
    """
    columns = u.detach().to("cpu", torch.float64).T.contiguous().numpy()
    n = columns.shape[1]
    total = np.zeros(n)
    for k, column in enumerate(columns):
        stream = hashlib.shake_128(f"{name}\0{k}".encode()).digest(8 + (n + 7) // 8)
        shift = int.from_bytes(stream[:8], "little") % n
        signed = np.where(_bits(stream[8:], n), -column, column)
        total[shift:] += signed[: n - shift]
        total[:shift] += signed[n - shift :]
    return torch.from_numpy(_signs(n) @ total)


def _bits(stream: bytes, n: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=n).view(np.bool_)


@functools.lru_cache(maxsize=16)
def _signs(n: int) -> np.ndarray:
    """The fixed signs a_j, (16, n); entry i is the same for every n."""
    streams = [
        hashlib.shake_128(f"modicum sketch {j}".encode()).digest((n + 7) // 8) for j in range(SKETCH_SIZE)
    ]
    return np.stack([np.where(_bits(stream, n), -1.0, 1.0) for stream in streams])

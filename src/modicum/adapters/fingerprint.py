"""Fingerprints of bases: short text that two machines can agree on although their rounding differs.

A fingerprint is `<token>:<base64 of 16 float32>`, the specification and the sketch of all columns of all
layers (`ops.digest.sketch`). Equality of bytes is no use here: two machines compute the same directions only
up to rounding, and a hash would refuse good adapters.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from modicum.errors import BasisMismatchError
from modicum.ops.digest import SKETCH_SIZE, sketch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from modicum.adapters.basis import BasisSpec

#: the largest deviation at which two fingerprints name the same basis
TOLERANCE = 0.02
#: root mean square change of the sketch that is refused however many columns share it; one turned column
#: moves it by about 2, and below 0.5 with a probability of 1e-7
_CAP = 0.5
#: entries whose sizes differ by less than this part may be ranked differently on another machine
_NEAR = 2e-3
#: near-tied columns that are tried in all combinations (two to this power)
_MOST_TURNED = 12


def fingerprint_of(items: Iterable[tuple[str, Tensor]], spec: BasisSpec, rank: int | None = None) -> str:
    """The fingerprint of the first `rank` columns (all by default) of the layers (name, u)."""
    total = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
    # sums of floats depend on their order; the order of the layers must not matter
    for name, u in sorted(items, key=lambda item: item[0]):
        total += sketch(name, u[:, :rank])
    return _text(spec, total.numpy())


def _text(spec: BasisSpec, numbers: np.ndarray) -> str:
    return f"{spec.token()}:{base64.b64encode(numbers.astype('<f4').tobytes()).decode()}"


def compare(a: str, b: str, columns: int) -> float:
    """The estimated deviation between two bases with `columns` columns in all: 0 for equal, inf for another kind.

    Independent deviations δ_k of the columns add up to a root mean square sketch difference of √Σ‖δ_k‖², so
    that divided by √columns estimates the deviation of one column. Over thousands of columns a single turned
    one would vanish in this average, so differences are also measured against a cap of 0.5 in absolute terms:
    the result is rms · max(1/√columns, TOLERANCE/0.5), and at most `TOLERANCE` means the same basis.
    """
    if a == b:
        return 0.0
    (kind_a, sketch_a), (kind_b, sketch_b) = _parsed(a), _parsed(b)
    if kind_a != kind_b:
        return math.inf
    rms = float(np.sqrt(np.mean(np.square(sketch_a - sketch_b))))
    deviation = rms * max(1.0 / math.sqrt(max(columns, 1)), TOLERANCE / _CAP)
    return deviation if math.isfinite(deviation) else math.inf


def turned_columns(
    wanted: str, items: Sequence[tuple[str, Tensor]], spec: BasisSpec
) -> list[tuple[str, int]] | None:
    """The columns (layer name, index) to turn so that the layers (name, u) have the fingerprint `wanted`.

    The sign rule looks at the largest entry of a column. Where the largest positive and the largest negative
    entry are all but equal, two machines may choose differently. Those few columns are known, so every
    combination of them is tried; None when no combination gives the wanted fingerprint.
    """
    near = [(name, k) for name, u in items for k in _near_ties(u)][:_MOST_TURNED]
    by_name, columns = dict(items), sum(u.shape[1] for _, u in items)
    _, numbers = _parsed(fingerprint_of(items, spec))
    parts = []
    for name, k in near:
        alone = torch.zeros_like(by_name[name])
        alone[:, k] = by_name[name][:, k]
        parts.append(sketch(name, alone).numpy())
    for size in range(1, len(near) + 1):
        for chosen in itertools.combinations(range(len(near)), size):
            turned = numbers - 2 * sum(parts[index] for index in chosen)
            if compare(wanted, _text(spec, turned), columns) <= TOLERANCE:
                return [near[index] for index in chosen]
    return None


def _near_ties(u: Tensor) -> list[int]:
    high, low = u.amax(0), -u.amin(0)
    return (torch.minimum(high, low) >= (1 - _NEAR) * torch.maximum(high, low)).nonzero().flatten().tolist()


def ensure_same(stored: str, found: str, columns: int) -> None:
    """Return when `stored`, of an adapter, and `found`, of the basis at hand, name the same basis.

    Raises:
        BasisMismatchError: they differ; the message says how, and what to do.
    """
    deviation = compare(stored, found, columns)
    if deviation <= TOLERANCE:
        return
    trained, here = stored.partition(":")[0], found.partition(":")[0]
    if trained != here:
        raise BasisMismatchError(
            f"the adapter was trained in a basis of kind {trained!r}, the basis at hand is {here!r}. {_advice(trained)}"
        )
    raise BasisMismatchError(
        f"the adapter was trained in another basis than the one at hand (deviation {deviation:.3g}, allowed "
        f"{TOLERANCE}): its numbers would mean something else here. Check that the base model is the one it was "
        f"trained on; if it is, the two machines computed different directions. {_advice(trained)}"
    )


def _advice(token: str) -> str:
    add = (
        "export the basis where the adapter was trained (`modicum basis build MODEL --output FILE`) and add it "
        "here with `modicum basis add FILE`"
    )
    if token.startswith("svd"):
        mode = "exact" if "-exact-" in token else "fast"
        return f"Rebuild it with `modicum basis build MODEL --mode {mode}`, the mode it was trained with, or {add}."
    return (
        f"Such a basis cannot be rebuilt from the weights alone: {add}."
        if token.startswith("stored")
        else (f"Set the same basis and seed in the adapter's configuration as in training, or {add}.")
    )


def _parsed(text: str) -> tuple[str, np.ndarray]:
    kind, _, numbers = text.partition(":")
    try:
        raw = base64.b64decode(numbers, validate=True)
    except binascii.Error:
        raw = b""
    if len(raw) != 4 * SKETCH_SIZE:
        raise BasisMismatchError(
            f"{text!r} is no basis fingerprint; it must read <kind>:<base64 of {SKETCH_SIZE} float32>. The adapter's "
            "configuration is damaged or was written by a newer version."
        )
    return kind, np.frombuffer(raw, dtype="<f4").astype(np.float64)

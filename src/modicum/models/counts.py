"""How many numbers the methods we compare with train and save, in closed form, from layer shapes alone.

Our own methods carry their closed form themselves (`Adapter.count`). These are the methods of PEFT, with its
default options, and full fine-tuning; each form is tested against the real PEFT model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Shapes = Mapping[str, tuple[int, int]]

#: PEFT's default length of TinyLoRA's trained vector
TINY_LORA_U = 64


@dataclass(frozen=True)
class Baseline:
    """What one method trains on layers of given shapes {name: (out, in)} at rank r."""

    formula: str
    trained: Callable[[Shapes, int], int]
    #: frozen numbers that PEFT writes into every adapter folder although they can be made again
    frozen: Callable[[Shapes, int], int]


def _nothing(shapes: Shapes, rank: int) -> int:
    del shapes, rank
    return 0


def _lora(shapes: Shapes, rank: int) -> int:
    return sum(rank * (out + into) for out, into in shapes.values())


def _dora(shapes: Shapes, rank: int) -> int:
    return _lora(shapes, rank) + sum(out for out, _ in shapes.values())


def _vera(shapes: Shapes, rank: int) -> int:
    return sum(out + rank for out, _ in shapes.values())


def _vera_frozen(shapes: Shapes, rank: int) -> int:
    # one pair of random matrices for all layers, as wide as the widest
    return rank * (max(out for out, _ in shapes.values()) + max(into for _, into in shapes.values()))


def _tiny_lora(shapes: Shapes, rank: int) -> int:
    del rank
    return TINY_LORA_U * len(shapes)


def _tiny_lora_frozen(shapes: Shapes, rank: int) -> int:
    ranks = [(min(rank, out, into), out + into) for out, into in shapes.values()]
    return sum(r * width + TINY_LORA_U * r * r for r, width in ranks)


def _psoft(shapes: Shapes, rank: int) -> int:
    return len(shapes) * (rank * (rank - 1) // 2 + 2 * rank)


BASELINES: dict[str, Baseline] = {
    "lora": Baseline("r (in + out)", _lora, _nothing),
    "dora": Baseline("r (in + out) + out", _dora, _nothing),
    "vera": Baseline("out + r", _vera, _vera_frozen),
    "tiny_lora": Baseline(f"{TINY_LORA_U} (u)", _tiny_lora, _tiny_lora_frozen),
    "psoft": Baseline("r (r - 1) / 2 + 2 r", _psoft, _nothing),
}

#: full fine-tuning: every parameter of the model, whatever the targets
FULL = "full"


def baseline(name: str) -> Baseline:
    """The baseline called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in BASELINES:
        raise ConfigError(
            f"no baseline {name!r}{did_you_mean(name, BASELINES)}; known: {', '.join(BASELINES)}"
        )
    return BASELINES[name]

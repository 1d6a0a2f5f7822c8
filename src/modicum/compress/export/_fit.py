"""What an engine's file says of one layer, and how it asks for the libraries it needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.errors import MissingExtraError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """The weight of one layer as an engine holds it."""

    #: the engine's name for the storage
    home: str
    #: whether only the rounding of number types separates it from the layer
    exact: bool
    #: what is stored; the engine's file alone knows the keys
    parts: dict[str, Any]
    #: (out, in) float32, as the engine decodes it
    decoded: Tensor
    #: why it is larger or coarser than the layer, for people; empty when it is neither
    note: str = ""


def need(*modules: str) -> None:
    """Check that the `modules` of the extra `export` are installed.

    Raises:
        MissingExtraError: one is not.
    """
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingExtraError(f"this export needs {' and '.join(absent)}: pip install 'modicum[export]'")

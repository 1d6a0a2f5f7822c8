"""safetensors files read tensor by tensor with NumPy: no torch, and no whole tensor in memory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: safetensors' type names -> (ours, the NumPy type that carries them)
_TYPES = {
    "F64": ("float64", "<f8"), "F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
    "F8_E4M3": ("float8_e4m3", "u1"), "F8_E5M2": ("float8_e5m2", "u1"),
    "I64": ("int64", "<i8"), "I32": ("int32", "<i4"), "I16": ("int16", "<i2"), "I8": ("int8", "i1"),
    "U64": ("uint64", "<u8"), "U32": ("uint32", "<u4"), "U16": ("uint16", "<u2"), "U8": ("uint8", "u1"),
    "BOOL": ("bool", "?"),
}  # fmt: skip
#: types that NumPy carries as bit patterns: all bits but the sign
_MAGNITUDE = {"bfloat16": 0x7FFF, "float8_e4m3": 0x7F, "float8_e5m2": 0x7F}
#: numbers looked at at a time
_PART = 1 << 22


class DamagedFileError(ValueError):
    """What is wrong with a file; turned into the state of an inspection."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file; its numbers are read when they are asked for."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    #: NumPy type of the stored numbers; bit patterns where NumPy has no such type
    carrier: str
    start: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What they take."""
        return self.size * np.dtype(self.carrier).itemsize

    def array(self) -> np.ndarray:
        """The numbers, mapped from the file; bfloat16 and float8 as bit patterns."""
        if not self.size:
            return np.empty(self.shape, self.carrier)
        return np.memmap(self.file, self.carrier, "r", self.start, self.shape)

    def parts(self) -> Iterator[np.ndarray]:
        """The numbers in their order, some at a time."""
        flat = self.array().reshape(-1)
        for at in range(0, self.size, _PART):
            yield flat[at : at + _PART]

    def zeros(self, part: np.ndarray) -> int:
        """How many of `part` are exactly 0, of either sign."""
        mask = _MAGNITUDE.get(self.dtype)
        return part.size - int(np.count_nonzero(part if mask is None else part & part.dtype.type(mask)))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; reads the header alone.

    Raises:
        DamagedFileError: no such header, or the file is longer or shorter than it says.
    """
    total = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= total else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found, end = {}, 8 + length
        for name, spec in header.items():
            dtype, carrier = _TYPES[spec["dtype"]]
            start, stop = (8 + length + int(offset) for offset in spec["data_offsets"])
            tensor = StoredTensor(file, dtype, tuple(int(n) for n in spec["shape"]), carrier, start)
            if stop - start != tensor.bytes:
                raise ValueError(f"{name} is cut short")  # noqa: TRY301 - one place words the error
            found[name], end = tensor, max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{file.name} is damaged ({error}); get the file again") from error
    if end != total:
        raise DamagedFileError(f"{file.name} is damaged ({total} bytes instead of {end}); get the file again")
    return found

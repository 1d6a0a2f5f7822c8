"""How numbers are stored: the types a record may have, casting to them and back, and what is finite.

NumPy has no bfloat16: its bit patterns are carried in uint16.
"""

from __future__ import annotations

import numpy as np

from modicum.errors import ConfigError

#: types of the packed values: name -> NumPy type that carries them
VALUE_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
#: all types, with those that only full modules may have; the position in this table is the code in a file
DTYPES = {
    **VALUE_DTYPES,
    "float64": np.dtype("<f8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

#: bits of the exponent of a bfloat16, all set where it is infinite or no number
_EXPONENT = 0x7F80


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` rounded to nearest-even in `dtype`, as stored (bfloat16 as uint16).

    Raises:
        ConfigError: unknown `dtype`, or a finite value that becomes infinite in it.
    """
    if dtype not in VALUE_DTYPES:
        raise ConfigError(f"values cannot be stored as {dtype!r}, only as {', '.join(VALUE_DTYPES)}")
    if dtype == "bfloat16":
        stored = to_bfloat16(values)
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(VALUE_DTYPES[dtype])
    if not finite(stored, dtype):
        largest = float(np.abs(values).max())
        wider = "bfloat16 or float32" if dtype == "float16" else "float32"
        raise ConfigError(f"a value of magnitude {largest:.4g} does not fit {dtype}; save it as {wider}")
    return stored


def to_floats(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as float32, a copy unless they are that already; wider and integer types as they are."""
    if dtype == "bfloat16":
        return from_bfloat16(stored)
    return stored.astype("<f4") if dtype == "float16" else stored


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bit patterns of float32 `values` rounded to nearest-even in bfloat16."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype("<u2")


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 values with these bfloat16 bit patterns."""
    return (bits.astype("<u4") << np.uint32(16)).view("<f4")


def finite(stored: np.ndarray, dtype: str) -> bool:
    """Whether no stored value is NaN or infinite."""
    if dtype == "bfloat16":
        return int((stored & np.uint16(_EXPONENT)).max(initial=0)) < _EXPONENT
    return stored.dtype.kind != "f" or bool(np.isfinite(stored).all())

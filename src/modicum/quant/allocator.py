"""Keeping freed memory: what decides how fast layers that dequantize on every pass are on a CPU."""

from __future__ import annotations

import ctypes
import functools
import sys

#: numbers of the options in glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: larger than any single weight (a 32768 × 32768 matrix of bfloat16 has 2 GiB); the options are C ints
_LARGEST = 2**31 - 1


@functools.cache
def keep_freed_memory() -> bool:
    """Whether freed blocks now stay with this process for reuse; False without glibc, where nothing is changed.

    glibc maps every block above 32 MiB anew and gives it back when it is freed. A layer that dequantizes its
    weight on each pass then pays for fresh, zeroed pages each time. With both thresholds raised, the memory
    of one weight is used again by the next. The price: the process keeps its peak memory until it ends. The
    setting holds for the whole process; a threshold set in the environment (MALLOC_MMAP_THRESHOLD_,
    GLIBC_TUNABLES) is replaced.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl has a mallopt that does nothing, but not this
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    # glibc caps the first at half an arena's heap and says so by answering 0
    taken = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_THRESHOLD, 32 * 2**20)
    return bool(mallopt(_TRIM_THRESHOLD, _LARGEST) and taken)

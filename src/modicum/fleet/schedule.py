"""When cohorts are finished on machines that take them in turn, and that fail now and then.

A machine that fails takes its cohort with it, which then begins anew. With failures at random moments, `mtbf` apart on
average, a cohort of t seconds takes (mtbf + restart) · (exp(t / mtbf) − 1) in the mean, and exp(t / mtbf) − 1 attempts
too many (A. Duda, The effects of checkpointing on program execution time, Inf. Proc. Letters 16, 1983, 221).
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def with_failures(seconds: float, mtbf: float, restart: float) -> tuple[float, float]:
    """(seconds until a cohort of `seconds` is finished, attempts that failed), in the mean."""
    again = math.expm1(seconds / mtbf)
    return (mtbf + restart) * again, again


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Seconds until all cohorts are finished, each taken in turn by the worker who is free first."""
    free = [0.0] * min(workers, max(1, len(seconds)))
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)

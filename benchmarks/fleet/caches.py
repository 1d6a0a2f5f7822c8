"""How often a pool of adapters in memory has the one that is asked for, under Zipf's law."""

from __future__ import annotations

import math
from collections import OrderedDict

import numpy as np

#: ranks of users that are counted one by one; above, by the thousandth part of a decade
_ONE_BY_ONE = 100_000


def ranks(users: int) -> tuple[np.ndarray, np.ndarray]:
    """(rank, how many users it stands for): one by one at first, then in steps of a thousandth of a decade."""
    first = np.arange(1, min(users, _ONE_BY_ONE) + 1, dtype=np.float64)
    if users <= _ONE_BY_ONE:
        return first, np.ones_like(first)
    edges = np.unique(np.round(np.logspace(5, math.log10(users), int(1000 * math.log10(users / 1e5)) + 2)))
    width = np.diff(edges)
    middle = np.sqrt((edges[:-1] + 1) * edges[1:])
    return np.concatenate([first, middle]), np.concatenate([np.ones_like(first), width])


def hit_rate(users: int, slots: int, exponent: float) -> float:
    """Requests that find their adapter in a pool of the last used, by Che's approximation."""
    if slots >= users:
        return 1.0
    rank, weight = ranks(users)
    chance = rank**-exponent
    chance /= (chance * weight).sum()
    low, high = 0.0, 1.0
    while (weight * -np.expm1(-chance * high)).sum() < slots:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        full = (weight * -np.expm1(-chance * middle)).sum() >= slots
        low, high = (low, middle) if full else (middle, high)
    return float((weight * chance * -np.expm1(-chance * high)).sum())


def wanted_by(users: int, share: float, exponent: float) -> float:
    """How many users, the most active ones, make this share of all requests."""
    rank, weight = ranks(users)
    upto = np.cumsum(weight * rank**-exponent)
    return float(np.cumsum(weight)[np.searchsorted(upto, share * upto[-1])])


def replayed(adapters: int, slots: int, exponent: float, turns: int, requests: int, seed: int) -> float:
    """Hit rate of a pool of the last used, request by request, as `benchmarks/serving/zipf.py` asks it.

    Every turn first loads the most wanted adapters, so that what is measured is on its way from those to the rest.
    """
    rng = np.random.default_rng(seed)
    edges = np.cumsum(np.arange(1, adapters + 1, dtype=np.float64) ** -exponent)
    hits = 0
    pool: OrderedDict[int, None] = OrderedDict()
    for _ in range(turns):
        pool.update(dict.fromkeys(range(slots)))
        while len(pool) > slots:
            pool.popitem(last=False)
        for one in np.searchsorted(edges, rng.random(requests) * edges[-1]).tolist():
            hits += one in pool
            pool[one] = None
            pool.move_to_end(one)
            if len(pool) > slots:
                pool.popitem(last=False)
    return hits / turns / requests

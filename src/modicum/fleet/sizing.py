"""How many tokens fit into a pass, and how many users into a cohort, by the memory that there is."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from modicum.data.encoded import Encoded, EncodedRow
from modicum.errors import ConfigError
from modicum.evaluate.memory import Peak
from modicum.fleet.cohort import Cohort
from modicum.fleet.passes import Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.fleet.base import FleetBase
    from modicum.fleet.spec import FleetSpec, TrainOptions

#: shares of the free memory that a pass and the numbers of a cohort may take
_PASS, _NUMBERS = 0.5, 0.25
#: beyond these, more gains nothing: a processor is busy long before, and larger passes leave its caches and cost
#: it pages; a cohort is what a crash costs
_MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}
_MOST_USERS = {"cpu": 256, "cuda": 4096}
#: rows that the memory of a pass is measured with
_SAMPLE = 4
#: bytes of a trained number of a user: itself, two moments, gradient, a copy of what steps, and the best so far
_NUMBER = 4 * 6


@dataclass(frozen=True)
class Sizes:
    """What a job was begun with, and keeps when it goes on, so that it ends with the same numbers."""

    tokens: int
    users: int
    threads: int
    #: of one token in a pass, and of the numbers of one user
    token_bytes: int | None = None
    user_bytes: int | None = None
    #: of the memory that was free, for which they were found
    share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def sizes(base: FleetBase, options: TrainOptions, sample: Encoded, rank: int, share: float = 1.0) -> Sizes:
    """The sizes that `options` give, and else what fits into a `share` of the memory that is free.

    What a token takes is measured with a step on rows of `sample`.
    """
    numbers = base.widest.record.layout.size
    token = None
    if options.tokens_per_pass is None:
        token = token_bytes(base, {0: sample}, rank)
    free = int(share * free_bytes(base.device))
    tokens, users = fitting(options, base.device.type, free, numbers, token, max(sample.lengths))
    return Sizes(tokens, users, torch.get_num_threads(), token, user_bytes(numbers), share)


def check_room(known: Sizes, base: FleetBase, spec: FleetSpec, share: float) -> None:
    """Returns when sizes that were found for more memory also fit into a smaller `share` of what is free here.

    Raises:
        ConfigError: they do not; what would fit.
    """
    if share >= known.share:
        return
    options, token = spec.train, known.token_bytes
    if token is None:
        options = options.model_copy(update={"tokens_per_pass": known.tokens})
    free, numbers = int(share * free_bytes(base.device)), base.widest.record.layout.size
    tokens, users = fitting(options, base.device.type, free, numbers, token, spec.data.max_length)
    if known.tokens > tokens or known.users > users:
        raise ConfigError(
            f"the job began with passes of {known.tokens} tokens and cohorts of {known.users} users, and keeps them; "
            f"a worker here may take {share:.0%} of the memory, where {tokens} and {users} fit: go on with fewer "
            "workers, or begin again (--overwrite)"
        )


def longest_rows(base: FleetBase, length: int) -> Encoded:
    """Some rows of `length` tokens, with which the memory of a pass is measured."""
    row = EncodedRow([base.tokenizer.pad_token_id] * length, target=0.0 if base.task == "seq_cls" else None)
    return Encoded([row] * _SAMPLE, class_targets=True)


def fitting(
    options: TrainOptions, kind: str, free: int, numbers: int, token: int | None, longest: int
) -> tuple[int, int]:
    """Tokens of a pass and users of a cohort: what `options` give, and else what fits into `free` bytes.

    `kind`: cpu or cuda; `numbers`: trained ones of a user; `token`: bytes of a token in a pass, needed unless
    `options` give the tokens; `longest`: tokens of the longest row.
    """
    tokens, users = options.tokens_per_pass, options.cohort_size
    if tokens is None:
        assert token is not None
        tokens = max(longest, min(_MOST_TOKENS[kind], int(_PASS * free / token)))
    if users is None:
        users = max(1, min(_MOST_USERS[kind], int(_NUMBERS * free / user_bytes(numbers))))
    return tokens, users


def user_bytes(numbers: int) -> int:
    """Bytes that a user with so many trained numbers takes in a cohort, at most."""
    return _NUMBER * numbers


def token_bytes(base: FleetBase, sample: Mapping[int, Encoded], rank: int) -> int:
    """Bytes that one token takes in a step, measured on the first rows of `sample`; what does not grow is in it too."""
    rows: Sequence[int] = range(min(_SAMPLE, len(sample[0])))
    cohort = Cohort(base, [rank])
    lengths = [sample[0].lengths[row] for row in rows]
    one = Pass((0,), (tuple(rows),))
    with Peak(base.device) as peak:
        cohort.step(one, sample, [0.0], 0.0)
    fixed = 4 * 5 * base.widest.record.layout.size
    return max(1, (peak.bytes - fixed) // (len(lengths) * max(lengths)))


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on `device` without taking them from anybody."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:  # noqa: PTH123 - no file, the kernel's own words
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in stream}
        return found["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

"""Which arm a user gets: always the same one, and after a change of weights still the same one for most."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.serve.experiments.design import Arm

#: bytes of the hash by which a user is known
_KNOWN_BY = 16


def assign(salt: bytes, arms: Sequence[Arm], user: str) -> Arm:
    """The arm with the largest −weight / ln u, where u in (0, 1) is a salted hash of user and arm.

    Shares are those of the weights. An arm that gains weight takes users from the others, and nobody moves between
    arms that keep theirs in proportion, so that as few users move as can.
    Source: C. Schindelhauer, G. Schomaker, "Weighted distributed hash tables", SPAA 2005 (logarithmic method).
    """
    return max(arms, key=lambda arm: -arm.weight / math.log(_uniform(salt, arm.label, user)))


def pseudonym(salt: bytes, tenant: str, user: str) -> bytes:
    """The 16 bytes that stand for a tenant's user in the files of one experiment, and mean nothing elsewhere."""
    return _digest(salt, "user", tenant, user)


def owner(salt: bytes, tenant: str) -> bytes:
    """The 16 bytes that stand for a tenant."""
    return _digest(salt, "tenant", tenant)


def _uniform(salt: bytes, label: str, user: str) -> float:
    return (int.from_bytes(_digest(salt, "arm", label, user)[:6]) + 0.5) / 2**48


def _digest(salt: bytes, *parts: str) -> bytes:
    digest = hashlib.blake2b(key=salt, digest_size=_KNOWN_BY)
    for part in parts:
        data = part.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8) + data)
    return digest.digest()

"""Small real records for tests of the store."""

from __future__ import annotations

import numpy as np

from modicum.store.record import Record, build

NAMES = [f"model.layers.{layer}.self_attn.{which}_proj.R" for layer in range(2) for which in "qv"]


def record(seed: int = 0, r: int = 8, **about) -> Record:
    """A LoRA-XS record of four layers with normal random numbers, 8-byte description of who it is."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=(r, r)).astype(np.float32) for name in NAMES}
    about = {"config": {"r": r}, "base_fingerprint": "5f" * 16, "basis_fingerprint": [0.5] * 16, **about}
    return build("lora_xs", tensors, **about)

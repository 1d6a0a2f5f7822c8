"""What a store of many adapters may take: bytes on the disk, and memory of whoever reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modicum.store import Store
from modicum.store.record import build, encode

COUNT = 1500


def adapters():
    """As many as there are users: 20 cores of 16 × 16 numbers in bfloat16, 10 KB each."""
    rng = np.random.default_rng(0)
    for _ in range(COUNT):
        tensors = {
            f"model.layers.{n // 2}.self_attn.{'qv'[n % 2]}_proj.R": rng.standard_normal((16, 16), np.float32)
            for n in range(20)
        }
        yield f"users/{rng.bytes(16).hex()}", build("lora_xs", tensors, base_fingerprint="5f" * 32)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder, payload = tmp_path_factory.mktemp("load") / "store", 0
    with Store(folder, create=True) as store:
        made = list(adapters())
        payload = sum(len(encode(record)) for _, record in made)
        store.put_many(made, batch=500)
    return folder, payload, [name for name, _ in made]


def test_bytes_on_the_disk(filled):
    folder, payload, _ = filled
    disk = sum(512 * path.stat().st_blocks for path in folder.rglob("*"))
    assert payload / COUNT > 10_000
    assert disk <= 1.03 * payload + 200 * COUNT


def test_memory_of_a_reader(filled):
    folder, _, names = filled
    code = """
import json, sys
from modicum.store import Store
from modicum.store.engine import change
change._WAITED = 0.0  # as if the disk were slow: all the threads that read ahead have connections
def kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
names = json.load(sys.stdin)
with Store(sys.argv[1]) as store:
    for name in names:
        store.get(name)
    for start in range(0, len(names) - 64, 64):
        store.get_many(names[start:start + 64])
    print(kib())
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not say how much memory a process takes")
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 100 * 1024

"""Places and buckets behind the protocol of S3, on a server of our own; only where s3fs and moto are installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tests.store.small_records import record

from modicum.store import Put, Store, pull, push


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def endpoint():
    missing = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: pip install s3fs 'moto[server,s3]'")
    url = f"http://127.0.0.1:{(port := free_port())}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"},
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                break
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """The address of a new bucket."""
    import fsspec

    about = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in {**about, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}"


def test_a_place(bucket, tmp_path):
    with Store(tmp_path / "store", create=True) as store, Store(tmp_path / "other", create=True) as other:
        store.put_many([Put(f"u{n}", record(n), alias="production") for n in range(8)])
        assert push(store, f"{bucket}/place").sent == 8
        store.put("u0", record(100))
        store.purge("u1")
        assert push(store, f"{bucket}/place").sent > 0
        assert pull(other, f"{bucket}/place").stored == 8
        assert [str(version) for version in other.ls()] == [str(version) for version in store.ls()]
        assert other.get_many(f"u{n}@production" for n in (0, 2, 7)).versions == ("u0@1", "u2@1", "u7@1")
        assert other.verify().faults == ()


def test_objects_of_a_store_on_postgresql(bucket, postgres_server):
    address = f"{postgres_server}&schema=s3{time.monotonic_ns()}&objects={bucket}/objects"
    with Store(address, create=True) as store:
        store.put_many([Put(f"u{n}", record(n)) for n in range(8)])
        assert store.get("u3") == record(3)
        assert store.get_many(f"u{n}" for n in range(8)).values.shape == (8, 256)
        store.purge("u3")
        store.remove("u4", 1)
        assert store.gc().segments == 1
        assert store.verify().faults == ()
        assert len(store._backend.bucket.listed()) == 6

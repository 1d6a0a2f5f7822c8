"""Where the stores of the tests are: in a folder, and in a PostgreSQL server of our own, where Debian's package is."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest

#: who runs the server if we are root, which it refuses
_USERS = ("postgres", "nobody")


def _as_nobody_special(folder: Path) -> list[str]:
    """What to put before a command, so that it runs as a user who owns `folder`."""
    if os.getuid():
        return []
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    user = next((name for name in _USERS if name in known), None)
    if user is None or shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses to run as root, and there is nobody else here")
    shutil.chown(folder, user)
    entry = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


@pytest.fixture(scope="session")
def postgres_server():
    """The address of a private server on a socket, without schema and objects; started once per process of tests."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("no psycopg: pip install 'modicum[postgres]'")
    with contextlib.ExitStack() as stack:
        # a short path of its own: a socket's name has at most 107 bytes, and pytest's folders are for their owner only
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modicum-pg-")))
        before = _as_nobody_special(folder)

        def run(program, *arguments):
            command = [*before, str(programs[-1].with_name(program)), "-D", str(folder / "data"), *arguments]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, timeout=60
            )
            assert done.returncode == 0, done.stdout + done.stderr

        run("initdb", "-U", "modicum", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
        options = (
            f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=50"
        )
        # waiting with output kept open would be waiting for the server to end
        run("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        stack.callback(run, "pg_ctl", "-m", "immediate", "stop")
        yield f"postgresql://modicum@/postgres?host={folder}"


@pytest.fixture
def postgres(postgres_server, tmp_path):
    """The address of a store that can be made: a schema of its own, objects in a folder of the test."""
    return f"{postgres_server}&schema=s{uuid.uuid4().hex[:12]}&objects={tmp_path / 'objects'}"


@pytest.fixture
def open_umask():
    """New files are for everybody, unless whoever makes them says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(params=["embedded", "postgres"])
def location(request, tmp_path):
    """Where a store can be made, of either kind."""
    return tmp_path / "store" if request.param == "embedded" else request.getfixturevalue("postgres")

"""The library of a source in C: compiled for this processor on first use, kept in the cache.

It has no dependencies. Its threads are those of the OpenMP runtime that torch itself has loaded, found through
torch's library and handed over as function pointers: a second runtime would keep a second pool of threads, and
the two pools wait for each other by spinning.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("dequantize.c")
COMPILERS = ("c++", "g++", "clang++", "cc")
#: "native" is left out where a compiler does not know it
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared")
_NATIVE = "-march=native"
#: lines of /proc/cpuinfo that say what code a processor runs
_PROCESSOR = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part", "isa")
_SECONDS = 120


class NotBuiltError(Exception):
    """There is no library, and why; callers go on without one."""


def load(source: Path = SOURCE, *, contract: bool = False, keeps_lock: bool = False) -> ctypes.CDLL:
    """The library, compiled if the cache has none for this source, compiler and processor.

    `contract`: whether a product and a sum may be rounded once; headers are those in the folder of the source. It has
    a function `modicum_use_threads`. `keeps_lock`: whether calls keep Python's lock, for those that take microseconds.

    Raises:
        NotBuiltError: switched off, no Linux, no compiler, or the compiler failed.
    """
    if os.environ.get("MODICUM_NATIVE", "1") == "0":
        raise NotBuiltError("switched off by MODICUM_NATIVE=0")
    if sys.platform != "linux":
        raise NotBuiltError(f"only built on Linux, this is {sys.platform}")
    compiler = find_compiler()
    command = [compiler, *_FLAGS, f"-ffp-contract={'fast' if contract else 'off'}", "-x", "c", str(source)]
    kind = ctypes.PyDLL if keeps_lock else ctypes.CDLL
    name = f"{source.stem}-{_key(command, source)}.so"
    try:
        library = _kept(command, cache_folder() / name, kind)
    except (OSError, RuntimeError):
        # no home, no space, or a folder that nothing may be run from
        library = _unkept(command, name, kind)
    _share_threads(library)
    return library


def find_compiler() -> str:
    """The path of the compiler in $CXX, or of the first one there is.

    Raises:
        NotBuiltError: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))[:1]
    found = next(filter(None, map(shutil.which, wanted or COMPILERS)), None)
    if found is None:
        what = (
            f"$CXX = {wanted[0]!r} is no program"
            if wanted
            else f"none of {', '.join(COMPILERS)} is installed"
        )
        raise NotBuiltError(f"no compiler: {what}")
    return str(Path(found).resolve())


def cache_folder() -> Path:
    """The folder of compiled libraries: in $MODICUM_CACHE, else $XDG_CACHE_HOME/modicum, else ~/.cache/modicum."""
    root = os.environ.get("MODICUM_CACHE")
    if root:
        return Path(root) / "native"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "modicum" / "native"


def _key(command: list[str], source: Path) -> str:
    status = Path(command[0]).stat()
    parts = [*command[:-1], str(status.st_size), str(status.st_mtime_ns), _NATIVE, _processor()]
    state = hashlib.sha256("\n".join(parts).encode())
    for path in (source, *sorted(source.parent.glob("*.h"))):
        state.update(path.read_bytes())
    return state.hexdigest()[:24]


def _processor() -> str:
    """What decides which instructions run here; a home folder may be shared by different machines."""
    lines = [platform.machine()]
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
        lines += [line for line in first.splitlines() if line.split(":")[0].strip() in _PROCESSOR]
    return "\n".join(lines)


def _kept(command: list[str], path: Path, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    if path.is_file():
        # a damaged file is replaced below
        with contextlib.suppress(OSError):
            return kind(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    os.close(handle)
    try:
        _compile(command, partial)
        # whole or not at all, however many processes compile at once; they all make the same
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return kind(str(path))


def _unkept(command: list[str], name: str, kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="modicum-native-") as folder:
            _compile(command, str(Path(folder) / name))
            return kind(str(Path(folder) / name))
    except OSError as error:
        raise NotBuiltError(f"no folder to build in, or none to load from: {error}") from error


def _compile(command: list[str], output: str) -> None:
    compiler, *flags = command
    message = ""
    for native in ([_NATIVE], []):
        full = [compiler, *native, "-o", output, *flags]
        try:
            done = subprocess.run(full, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - a compiler of this machine, no shell
        except subprocess.TimeoutExpired:
            raise NotBuiltError(f"{compiler} took more than {_SECONDS} seconds") from None
        except OSError as error:
            raise NotBuiltError(f"{compiler} does not run: {error}") from error
        if done.returncode == 0:
            return
        message = (done.stderr or done.stdout).strip()[-1000:]
    raise NotBuiltError(f"{compiler} failed: {message}")


def _share_threads(library: ctypes.CDLL) -> None:
    """Hands torch's OpenMP runtime to the library, which runs on one thread without."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    # a lookup by this handle searches what torch is linked with; LLVM's and Intel's runtimes have the names too
    with contextlib.suppress(OSError, AttributeError):
        runtime = ctypes.CDLL(str(path))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        library.modicum_use_threads(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names))

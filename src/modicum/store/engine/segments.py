"""Segment files: objects one behind the other, each in a frame; see docs/design/store.md.

Nothing here knows which objects are alive. Writers hold the store's write lock; readers need none.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from modicum.errors import CorruptAdapterError, StoreError
from modicum.store.atomic import flush
from modicum.store.engine.interface import MovedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from modicum.store.engine.interface import Data

SUFFIX = ".seg"
_HEAD = struct.Struct("<8sHxxIQ4s")
_FILE_MAGIC = b"\x8aMODSEG\n"
_FORMAT = 1
#: bytes before the first frame
START = _HEAD.size + 4
_FRAME = struct.Struct("<4sIQ")
#: bytes before an object
FRAME_BYTES = _FRAME.size
_LIVE, _ERASED = b"mObj", b"gone"
# what some systems lack; the slower or the no way is right too
_flush = getattr(os, "fdatasync", os.fsync)
_advise = getattr(os, "posix_fadvise", None)
#: files held open by one process; a store of this many segments has a terabyte and more
_MOST_OPEN = 512
#: bytes that are read before anything says that they are there
_SMALL = 1 << 20
#: bytes overwritten at a time
_ZEROS = 1 << 20


def framed(size: int) -> int:
    """Bytes that an object of `size` bytes takes in a segment."""
    return FRAME_BYTES + -(-size // 8) * 8


class Segment:
    """One open file. It is closed when nobody refers to it, so that a reader never meets another file's number."""

    def __init__(self, path: Path, flags: int) -> None:
        self.path, self.handle = path, os.open(path, flags | os.O_CLOEXEC, 0o600)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)

    def read(self, start: int, size: int, into: bytearray | None = None) -> memoryview:
        """The object of `size` bytes whose frame is at `start`; its contents are not checked.

        It is read-only, or the end of `into`, of `framed(size)` bytes at least, where that is given.

        Raises:
            MovedError: it was erased.
            CorruptAdapterError: there is no such frame, or the file ends before it does.
        """
        # frame and object at once: the disk is asked once, and the system, which would take a second read of what
        # follows for the beginning of a stream, does not fetch more than is wanted
        wanted = FRAME_BYTES + size
        if size > _SMALL and os.pread(self.handle, FRAME_BYTES, start) != frame(size):
            wanted = FRAME_BYTES
        if into is None:
            found = memoryview(os.pread(self.handle, wanted, start))
        else:
            found = memoryview(into)[:wanted]
            found = found[: os.preadv(self.handle, [found], start)]
        front = bytes(found[:FRAME_BYTES])
        if front[: len(_ERASED)] == _ERASED:
            raise MovedError(f"{self.path.name} at {start}: erased")
        if front == frame(size) and len(found) == FRAME_BYTES + size:
            return found[FRAME_BYTES:]
        whole = os.fstat(self.handle).st_size >= start + FRAME_BYTES + size
        fault = "no object starts there" if whole else "the file is cut short"
        raise CorruptAdapterError(
            f"{self.path.name}, {size} bytes at {start}: {fault}; restore the store from a backup"
        )

    def expect(self, start: int, size: int) -> None:
        """Returns at once; the disk may begin to fetch the object, beside others."""
        if _advise is not None:
            _advise(self.handle, start, FRAME_BYTES + size, os.POSIX_FADV_WILLNEED)

    def gone(self) -> bool:
        """Whether the file has been unlinked since it was opened."""
        return os.fstat(self.handle).st_nlink == 0


def frame(size: int) -> bytes:
    """The 16 bytes before an object of `size` bytes."""
    return _FRAME.pack(_LIVE, zlib.crc32(size.to_bytes(8, "little")), size)


class Segments:
    """The segment files of one store."""

    def __init__(self, folder: Path, store: bytes) -> None:
        """`folder` of the files, and the four bytes that say to which `store` they belong."""
        self.folder, self._store = folder, store
        self._open: OrderedDict[int, Segment] = OrderedDict()
        self._guard = threading.Lock()

    def path(self, number: int) -> Path:
        """Where segment `number` lies."""
        return self.folder / f"{number:08d}{SUFFIX}"

    def numbers(self) -> list[int]:
        """The numbers of all files that are there."""
        return sorted(
            int(file.stem)
            for file in self.folder.glob(f"*{SUFFIX}")
            if file.stem.isascii() and file.stem.isdigit()
        )

    def get(self, number: int) -> Segment:
        """Segment `number`, open for reading.

        Raises:
            MovedError: there is no such file (any more).
        """
        found = self._open.get(number)
        if found is not None:
            return found
        try:
            found = Segment(self.path(number), os.O_RDONLY)
        except FileNotFoundError:
            raise MovedError(f"{self.path(number).name} is gone") from None
        with self._guard:
            # what a compaction has unlinked takes space until its last reader lets go
            for old in [n for n, segment in self._open.items() if segment.gone()]:
                del self._open[old]
            self._open[number] = found
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return found

    def close(self) -> None:
        """Returns when no file is held open any more, apart from those being read."""
        with self._guard:
            self._open.clear()

    def create(self, number: int) -> int:
        """Where the first frame of the new segment `number` goes; an empty file is on the disk.

        A file of that number can only be what a killed writer left, and is emptied.
        """
        path = self.path(number)
        head = _HEAD.pack(_FILE_MAGIC, _FORMAT, 0, number, self._store)
        segment = Segment(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        _write(segment.handle, head + zlib.crc32(head).to_bytes(4, "little"), 0)
        os.fsync(segment.handle)
        flush(self.folder)
        return START

    def append(self, number: int, end: int, objects: Sequence[Data]) -> list[int]:
        """The starts of the frames of `objects`, written at `end` of segment `number` and on the disk.

        What lies behind `end` belongs to nobody and is cut off first; if the disk is full, so is what was written.

        Raises:
            StoreError: the file is shorter than `end`.
            OSError: it cannot be written.
        """
        segment = Segment(self.path(number), os.O_RDWR)
        size = os.fstat(segment.handle).st_size
        if size < end:
            raise StoreError(
                f"{segment.path} is cut short: {size} bytes instead of {end}; restore the store from a backup"
            )
        if size > end:
            os.ftruncate(segment.handle, end)
        starts, parts, at = [], [], end
        for data in objects:
            starts.append(at)
            parts += [frame(len(data)), data, bytes(-len(data) % 8)]
            at += framed(len(data))
        try:
            _write(segment.handle, b"".join(parts), end)
            _flush(segment.handle)
        except OSError:
            os.ftruncate(segment.handle, end)
            raise
        return starts

    def erase(self, number: int, places: Sequence[tuple[int, int]]) -> None:
        """Returns when the objects at `places` (start, size) of segment `number` are zeros on the disk."""
        try:
            segment = Segment(self.path(number), os.O_RDWR)
        except FileNotFoundError:
            return  # compacted away
        for start, size in places:
            if os.pread(segment.handle, FRAME_BYTES, start) not in (frame(size), _gone(size)):
                continue  # not ours: never overwrite what is not known
            _write(segment.handle, _gone(size), start)
            for at in range(0, size, _ZEROS):
                _write(segment.handle, bytes(min(_ZEROS, size - at)), start + FRAME_BYTES + at)
        _flush(segment.handle)

    def unlink(self, number: int) -> int:
        """Bytes that came free by removing the file of segment `number`; 0 if it was not there."""
        path = self.path(number)
        size = path.stat().st_size if path.exists() else 0
        path.unlink(missing_ok=True)
        with self._guard:
            self._open.pop(number, None)
        return size

    def faults(self, segment: Segment, number: int, end: int) -> Iterator[str]:
        """What is wrong with segment `number` up to its catalogued `end`: its head, and frames that do not follow.

        Objects are not looked at.
        """
        name = segment.path.name
        head = os.pread(segment.handle, START, 0)
        if head != (wanted := _HEAD.pack(_FILE_MAGIC, _FORMAT, 0, number, self._store)) + zlib.crc32(
            wanted
        ).to_bytes(4, "little"):
            yield f"{name}: its first {START} bytes are not those of this segment of this store"
        size = os.fstat(segment.handle).st_size
        if size < end:
            yield f"{name}: cut short, {size} bytes instead of {end}"
        at = START
        while at < min(end, size):
            data = os.pread(segment.handle, FRAME_BYTES, at)
            if len(data) < FRAME_BYTES:
                break
            kind, crc, length = _FRAME.unpack(data)
            if kind not in (_LIVE, _ERASED) or zlib.crc32(data[8:]) != crc or at + framed(length) > end:
                yield f"{name}: damaged frame at {at}"
                break
            if any(os.pread(segment.handle, -length % 8, at + FRAME_BYTES + length)):
                yield f"{name}: damaged padding behind the object at {at}"
            at += framed(length)


def _gone(size: int) -> bytes:
    return _FRAME.pack(_ERASED, zlib.crc32(size.to_bytes(8, "little")), size)


def _write(handle: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written

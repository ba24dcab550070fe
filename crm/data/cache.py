"""Decoded frames kept for several processes: in memory that forked workers share, or in a file that all map.

A file is named after the content of the frames it was made from and their size, so it can never be of other data. Its
header says so again, and every frame has a checksum. Torch-free.

n = frames, h w = height, width in pixels
"""

import fcntl
import json
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import numpy as np

from crm.data.frames import Frame

VERSION = 1  # of the file's form
HEADER = 4096  # bytes; the frames begin at a page
Load = Callable[[int], Frame]

log = logging.getLogger(__name__)


class Shared:
    """Room for n frames in memory that processes forked later share; each is put there by whoever decodes it first."""

    def __init__(self, frames: int, size: tuple[int, int]) -> None:
        self.size = size
        room = mmap.mmap(-1, frames * (_bytes(size) + 1))  # pages that nobody writes take no memory
        self.block = np.frombuffer(room, np.uint8, frames * _bytes(size)).reshape(frames, -1)
        self.done = np.frombuffer(room, np.uint8, frames, offset=frames * _bytes(size))

    def get(self, index: int, name: str, night: bool) -> Frame | None:
        """The frame, without a copy, if some process has put it."""
        return unpack(self.block[index], self.size, name, night) if self.done[index] else None

    def put(self, index: int, frame: Frame) -> Frame:
        """The frame as it is kept from now on. Two processes may put one at the same time: they write the same."""
        pack(frame, self.block[index])
        self.done[index] = 1
        return unpack(self.block[index], self.size, frame.name, frame.night)


class Mapped:
    """All frames of a split in one file, made once and mapped by every process that wants them."""

    def __init__(self, path: Path, about: dict[str, Any], names: Sequence[str], load: Load) -> None:
        """Opens the file, or makes it from what `load` decodes: minutes for a large data set, and only once."""
        self.path, self.load = path, load
        self.size: tuple[int, int] = (about["size"][0], about["size"][1])
        self.about = {"version": VERSION, **about}
        with _alone(path):  # the others wait for whoever makes it
            found = self._map(len(names))
            if found is None:
                self._make(len(names))
                found = self._map(len(names))
        assert found is not None, f"{path} was just made"
        self.sums, self.block = found
        self.checked: set[int] = set()

    def get(self, index: int, name: str, night: bool) -> Frame | None:
        """The frame, without a copy; None, with a warning, if the file is damaged there."""
        if index not in self.checked:
            if crc32(self.block[index].data) != self.sums[index]:
                log.warning("%s is damaged: %s is decoded anew, and the file is made again next time", self.path, name)
                self.path.unlink(missing_ok=True)
                return None
            self.checked.add(index)
        return unpack(self.block[index], self.size, name, night)

    def put(self, index: int, frame: Frame) -> Frame:
        """The frame itself: the file was complete from the beginning, and is damaged there."""
        return frame

    def _map(self, frames: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Checksums (n,) and frames (n, bytes) of the file; None, with a warning if it is there, if it is not whole."""
        if not self.path.exists():
            return None
        start, length = HEADER + 4 * frames, frames * _bytes(self.size)
        with self.path.open("rb") as file:
            header = file.read(HEADER).rstrip(b"\0")
        try:
            whole = json.loads(header) == self.about and self.path.stat().st_size == start + length
        except ValueError:
            whole = False
        if not whole:
            log.warning("%s is damaged or of another version; it is made again", self.path)
            return None
        everything = np.memmap(self.path, np.uint8, mode="r")
        sums = np.array(everything[HEADER:start]).view(np.uint32)
        return sums, everything[start:].reshape(frames, -1)

    def _make(self, frames: int) -> None:
        """Decodes every frame into a file beside, which then takes the name."""
        log.info("decoding %d frames into %s", frames, self.path)
        header = json.dumps(self.about).encode()
        assert len(header) <= HEADER
        scratch = self.path.with_name(f".{self.path.name}.{uuid4().hex[:8]}")
        sums, room = np.zeros(frames, np.uint32), np.empty(_bytes(self.size), np.uint8)
        try:
            with scratch.open("wb") as file:
                file.write(header.ljust(HEADER, b"\0") + sums.tobytes())
                for index in range(frames):
                    pack(self.load(index), room)
                    sums[index] = crc32(room.data)
                    file.write(room.data)
                file.seek(HEADER)
                file.write(sums.tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def _alone(path: Path):
    """One process at a time where the file system has locks; elsewhere several make the same file, the last stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        with suppress(OSError):  # network file systems may have none
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go when the process ends
        yield


def _bytes(size: tuple[int, int]) -> int:
    """Of one frame: red, green, blue, thermal, label."""
    return 5 * size[0] * size[1]


def pack(frame: Frame, room: np.ndarray) -> None:
    """Writes a frame's pixels into (5 * h * w,) bytes."""
    pixels = frame.label.size
    room[: 3 * pixels] = frame.rgb.ravel()
    room[3 * pixels : 4 * pixels] = frame.thermal.ravel()
    room[4 * pixels :] = frame.label.ravel()


def unpack(room: np.ndarray, size: tuple[int, int], name: str, night: bool) -> Frame:
    """The frame whose pixels stand there; its arrays are views that cannot be written."""
    room = room.view()
    room.flags.writeable = False
    rgb, thermal, label = np.split(room, [3 * size[0] * size[1], 4 * size[0] * size[1]])
    return Frame(
        name=name, rgb=rgb.reshape(*size, 3), thermal=thermal.reshape(size), label=label.reshape(size), night=night
    )

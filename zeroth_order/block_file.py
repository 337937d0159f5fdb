"""Where the blocks of a model lie while they are not in memory: places in one working file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import mmap
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import torch
from torch import Tensor

# Bytes: a file that is read past the page cache takes whole pages, also in memory.
PAGE = 4096
# Bytes: where a tensor of its own would begin.
ALIGNMENT = 64
READ_AT_ONCE = 16 << 20
# Parameters of glibc's mallopt, and from how many bytes on a piece of memory is mapped by itself:
# each piece costs page faults, at 1 MiB a fifth of a step.
MMAP_THRESHOLD, ARENA_MAX, OWN_PIECE = -3, -8, 8 << 20

# What is stored: a parameter, or (a parameter, the name of its state).
Key = Hashable


class Region:
    """A block's place: its tensors, one behind the other, from a page to a page."""

    def __init__(self, tensors: Iterable[tuple[Key, torch.Size, torch.dtype]]) -> None:
        self.start = 0  # in the working file, if the block is there
        end = 0
        self.places: dict[Key, tuple[int, torch.Size, torch.dtype]] = {}
        for key, shape, dtype in tensors:
            self.places[key] = (end, shape, dtype)
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.size = -(-end // PAGE) * PAGE

    def views(self, buffer: Tensor) -> dict[Key, Tensor]:
        """Return the tensors of a block that lies in a buffer."""
        found = {}
        for key, (start, shape, dtype) in self.places.items():
            size = math.prod(shape) * dtype.itemsize
            found[key] = buffer[start : start + size].view(dtype).view(shape)
        return found


def give_freed_memory_back() -> None:
    """Let glibc return freed memory to the system, in this whole process.

    It keeps free pieces of up to 32 MiB in a heap for each thread: beside streamed blocks, several
    times what they need.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(ARENA_MAX, 1)
        mallopt(MMAP_THRESHOLD, OWN_PIECE)


def page_aligned(size: int) -> Tensor:
    """Return memory that begins with a page and, once freed, goes back to the system at once."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), flags=flags), dtype=torch.uint8)[:size]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def transfer(call: Callable[..., int], descriptor: int, memory: memoryview, start: int) -> None:
    """Read or write (``os.preadv``, ``os.pwritev``) all of ``memory``, at ``start`` of a file."""
    done = 0
    while done < len(memory):
        count = call(descriptor, [memory[done : done + READ_AT_ONCE]], start + done)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was")
        done += count


class NoRoom(OSError):
    """A disk has no room for the blocks; says how much they take."""

    @classmethod
    def of(cls, folder: Path, size: int) -> NoRoom:
        """Make one, for a folder that need not be there."""
        needed, free = (f"{each / 2**20:,.0f} MiB" for each in (size, free_bytes(folder)))
        return cls(f"{folder}: blocks take {needed} there, {free} are free")


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free where a folder is, or would be."""
    places = (folder, *folder.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.exists())).free


def reserve(descriptor: int, size: int) -> None:
    """Reserve disk space for a file, or make it that long where the system cannot reserve any.

    Where a file system cannot, glibc writes single bytes, which a file that is written past the
    page cache refuses.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, size)


class WorkingFile:
    """A file without a name, which goes when the process ends, however it ends.

    It is read and written past the page cache, where the file system can: a cache that drops what
    was used longest ago keeps nothing of a model that is read in turn and is larger than it.
    ``close`` gives the disk space back.

    Raises:
        NoRoom: the disk is full.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, size: int) -> None:
        if free_bytes(folder) < size:
            raise NoRoom.of(folder, size)
        folder.mkdir(parents=True, exist_ok=True)
        path, flags = folder / f".hizoo-blocks-{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= os.O_CLOEXEC
        try:
            self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # Linux creates it before it refuses
            self.descriptor = os.open(path, flags, 0o600)
        path.unlink()
        self.close = weakref.finalize(self, os.close, self.descriptor)
        try:
            reserve(self.descriptor, max(size, 1))
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise NoRoom.of(folder, size) from error

    def read(self, start: int, buffer: Tensor) -> None:
        """Read a page-aligned buffer."""
        transfer(os.preadv, self.descriptor, bytes_of(buffer), start)

    def write(self, start: int, buffer: Tensor) -> None:
        """Write a page-aligned buffer."""
        transfer(os.pwritev, self.descriptor, bytes_of(buffer), start)

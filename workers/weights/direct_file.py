"""Reads of a file past the page cache: what passes through memory once must not push out what is used again."""

import errno
import os

import torch

ALIGNMENT = 4096  # of offsets, sizes and addresses, as every disk takes them


class DirectFile:
    """A file that is read past the page cache, or through it and out again where its file system knows no other way."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            self._direct = hasattr(os, "O_DIRECT")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._go_through_cache()

    def _go_through_cache(self) -> None:
        self._file, self._direct = os.open(self._path, os.O_RDONLY), False

    def read(self, buffer: torch.Tensor, offset: int, size: int) -> torch.Tensor:
        """Read `size` bytes from an offset into a buffer of `new_buffer`; return the part of it that holds them.

        Raises: OSError, also where the file ends before.
        """
        start = offset - offset % ALIGNMENT
        wanted = offset + size - start
        view, done = buffer.numpy().data, 0
        while done < wanted:
            try:
                count = os.preadv(self._file, [view[done : -(-wanted // ALIGNMENT) * ALIGNMENT]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._path = f"/proc/self/fd/{self._file}"  # the same file, whatever has its path by now
                self._go_through_cache()
                continue
            if not count:
                raise OSError(errno.EIO, "it ends before its weights do", self._path)
            done += count
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, start, wanted, os.POSIX_FADV_DONTNEED)
        return buffer[offset - start : offset - start + size]


def new_buffer(size: int, pinned: bool) -> torch.Tensor:
    """Return an aligned buffer, flat uint8, for reads of up to `size` bytes; `pinned`: page-locked."""
    memory = torch.empty(size + 3 * ALIGNMENT, dtype=torch.uint8, pin_memory=pinned)
    skip = -memory.data_ptr() % ALIGNMENT
    return memory[skip : skip + size + 2 * ALIGNMENT]

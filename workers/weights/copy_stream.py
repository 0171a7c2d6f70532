"""Copies beside computation: a stream of its own on a GPU; on a CPU the same calls, each done when it returns."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from workers.errors import WeightsLost
from workers.tensors import flat_bytes
from workers.weights.direct_file import ALIGNMENT, new_buffer
from workers.weights.page_locks import PageLocks, Part

Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (place, source)


class Mark:
    """A moment in a queue of work, to be waited for."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self.event = event


class CopyStream(Protocol):
    device: torch.device

    def expect(self, sources: Iterable[torch.Tensor]) -> None:
        """Prepare for sources that will be copied again and again."""

    def mark(self) -> Mark:
        """Mark what has been queued for computation up to now."""

    def copy(self, copies: Copies, after: Mark) -> Mark:
        """Copy once `after` has been reached, without holding up the computation."""

    def wait(self, mark: Mark) -> None:
        """Let the computation that is queued from now on wait for a copy."""

    def synchronize(self) -> None:
        """Wait here until everything queued is done."""


class HostCopyStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def expect(self, sources: Iterable[torch.Tensor]) -> None:
        pass

    def mark(self) -> Mark:
        return Mark(None)

    def copy(self, copies: Copies, after: Mark) -> Mark:
        for place, source in copies:
            place.copy_(source)
        return Mark(None)

    def wait(self, mark: Mark) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaCopyStream:
    """A CUDA stream for copies; weights that `locks` has not page-locked pass through a page-locked buffer."""

    def __init__(self, device: torch.device, locks: PageLocks) -> None:
        self.device, self._locks = device, locks
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def expect(self, sources: Iterable[torch.Tensor]) -> None:
        self._locks.expect(sources)

    def mark(self) -> Mark:
        return Mark(torch.cuda.current_stream(self.device).record_event())

    def copy(self, copies: Copies, after: Mark) -> Mark:
        with torch.cuda.stream(self._stream):
            assert after.event is not None
            self._stream.wait_event(after.event)
            for place, source in copies:
                to, what = flat_bytes(place), flat_bytes(source)
                for part in self._locks.parts(source):  # no copy may reach over two pieces of locked memory
                    self._copy(to[part.start : part.end], what[part.start : part.end], part)
            return Mark(self._stream.record_event())

    def _copy(self, place: torch.Tensor, source: torch.Tensor, part: Part) -> None:
        if part.locked:
            place.copy_(source, non_blocking=True)
            return
        if not self._buffers:
            self._buffers = [(new_buffer(BUFFER_BYTES, pinned=True), torch.cuda.Event()) for _ in range(2)]
        for start in range(0, source.nbytes, BUFFER_BYTES):
            size = min(BUFFER_BYTES, source.nbytes - start)
            buffer, free = self._buffers[self._turn]
            self._turn = 1 - self._turn
            free.synchronize()
            if part.file:
                ready = part.file.read(buffer, part.offset + start, size)
            else:
                ready = buffer[:size].copy_(source[start : start + size])
            place[start : start + size].copy_(ready, non_blocking=True)
            free.record(self._stream)

    def wait(self, mark: Mark) -> None:
        assert mark.event is not None
        torch.cuda.current_stream(self.device).wait_event(mark.event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class Ordered(Mark):
    """The end of a copy that a thread makes."""

    __slots__ = ("copy",)

    def __init__(self, copy: Future[Mark]) -> None:
        super().__init__(None)
        self.copy = copy


class ThreadedCopyStream:
    """The copies of another stream, made by a thread, one after the other: what is read from a disk holds up nobody.

    Once one could not be made, whatever is asked raises WeightsLost: others may have gone over its place since.
    """

    def __init__(self, stream: CopyStream) -> None:
        self.device, self._stream = stream.device, stream
        self._thread = ThreadPoolExecutor(1, "copies")
        self._failure: Exception | None = None

    def expect(self, sources: Iterable[torch.Tensor]) -> None:
        self._stream.expect(sources)

    def mark(self) -> Mark:
        return self._stream.mark()

    def copy(self, copies: Copies, after: Mark) -> Mark:
        return Ordered(self._thread.submit(self._copy, list(copies), after))

    def _copy(self, copies: Copies, after: Mark) -> Mark:
        try:
            return self._stream.copy(copies, after)
        except Exception as error:
            self._failure = error
            raise

    def wait(self, mark: Mark) -> None:
        """Wait for the thread here, and let the computation wait for the copy."""
        assert isinstance(mark, Ordered)
        mark.copy.exception()
        self._check()
        self._stream.wait(mark.copy.result())

    def synchronize(self) -> None:
        self._thread.submit(self._stream.synchronize).result()
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise WeightsLost("weights could not be copied") from self._failure


CopyStreams = Callable[[torch.device, PageLocks | None], CopyStream]
# Of page-locked memory, twice, where weights can't be page-locked; its allocator rounds up to a power of two.
BUFFER_BYTES = (32 << 20) - 3 * ALIGNMENT


def copy_stream_for(device: torch.device, locks: PageLocks | None) -> CopyStream:
    """Return a device's copy stream; `locks` are those of the weights that a GPU's stream is to copy."""
    if locks is None:
        return HostCopyStream(device)
    stream = CudaCopyStream(device, locks)
    return ThreadedCopyStream(stream) if locks.limited else stream

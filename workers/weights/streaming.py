"""A part of every block passes through a ring of GPU memory, while the blocks before it compute.

Which part is decided by sizes alone (`plan_stream`), so it can be tested without a device. `Ring` does it: a block's
streamed weights are copied to their place in the ring, on a stream of their own, as soon as the block that lay there
before is done, and the block waits for them. What a block reads is right in any order of blocks: one whose weights
aren't on their way fetches them itself.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from workers.weights.copy_stream import CopyStream, Mark
from workers.weights.sharded import LocalPart

ALIGNMENT = 256  # bytes
SEGMENT = 2 << 20  # bytes; kRoundLarge of torch's CUDACachingAllocator
LARGEST_RING = 1 / 24  # of a model's bytes, where there is a choice
SLOTS_OF_A_SMALL_RING = 3  # with two, copies and computing wait for each other: 3 % of FLUX.1-dev's time on an H100
MOST_FOR_SLOTS = 1.1  # times what must be streamed at least, for a ring of so many
LEAST_SHARE = 0.01  # of a block's largest weight: smaller ones stay


def room(size: int) -> int:
    """Bytes to set aside for a weight of so many, wherever it must begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT


def memory_of_its_own(size: int, device: torch.device) -> torch.Tensor:
    """Flat uint8 memory of so many bytes which nothing else shares a segment of the allocator's with.

    The allocator takes large pieces in multiples of SEGMENT and puts other tensors into what is left of the last one: a
    small tensor that lived on kept 11 GB of Qwen-Image's weights from being given back (2026-11-25).
    """
    whole = -(-size // SEGMENT) * SEGMENT if device.type == "cuda" else size
    return torch.empty(whole, dtype=torch.uint8, device=device)[:size]


def view_of(memory: torch.Tensor, offset: int, source: torch.Tensor) -> torch.Tensor:
    """A tensor as `source`, within the `room` of flat uint8 memory from `offset` on.

    It begins where kernels find what they would in the plain pipeline: on a GPU at a multiple of ALIGNMENT, as the
    allocator gives it; on a CPU as far from one as the source lies, since a CPU's sums depend on that.
    """
    wanted = source.data_ptr() if memory.device.type == "cpu" else 0
    start = offset + (wanted - memory.data_ptr() - offset) % ALIGNMENT
    return memory[start : start + source.nbytes].view(source.dtype).view(source.shape)


@dataclass(frozen=True, slots=True)
class Block:
    """A module of a row that is run in order, and its weights' sizes by their names in the model."""

    name: str
    weights: Mapping[str, int]  # bytes

    @property
    def large(self) -> dict[str, int]:
        """The weights that are worth a copy of their own."""
        least = LEAST_SHARE * max(self.weights.values(), default=0)
        return {name: size for name, size in self.weights.items() if size >= least}

    @property
    def nbytes(self) -> int:
        return sum(self.large.values())


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """The weights of each block that are streamed, in the order in which blocks run, and where in the ring it lies."""

    pieces: tuple[tuple[str, ...], ...]  # names of weights for each block; may be empty
    offsets: tuple[int, ...]  # of each piece in the ring, bytes
    ring_bytes: int
    streamed_bytes: int  # each pass through the model

    def resident_bytes(self, total: int) -> int:
        return total - self.streamed_bytes + self.ring_bytes


def plan_stream(blocks: Sequence[Block], total: int, budget: int) -> StreamPlan | None:
    """The streaming that fits `total` bytes of weights into `budget`; None if none does.

    The same number of bytes of each block, as near as whole weights allow, so that the link has the same to do all the
    time: blocks take about the same time, and whole blocks in a row would leave the link idle in between.
    """
    # More slots hide more of a link's unevenness, but their bytes must be streamed instead of staying.
    fitting = {slots: plan for slots in (8, 4, 3, 2, 1) if (plan := plan_with(blocks, total, budget, slots))}
    least = min(fitting.values(), key=lambda plan: plan.streamed_bytes, default=None)
    for slots, plan in fitting.items():
        cheap = least and plan.streamed_bytes <= MOST_FOR_SLOTS * least.streamed_bytes
        if plan.ring_bytes <= LARGEST_RING * total or (slots == SLOTS_OF_A_SMALL_RING and cheap):
            return plan
    return least


def least_bytes(blocks: Sequence[Block], total: int) -> int:
    """The smallest budget that there is a plan for: all streamed, in a ring for one block."""
    everything = [tuple(block.large) for block in blocks]
    return min(total, lay_out(everything, 1, blocks).resident_bytes(total)) if blocks else total


def plan_with(blocks: Sequence[Block], total: int, budget: int, slots: int) -> StreamPlan | None:
    """Plan as `plan_stream` does, with a ring of `slots` of its largest pieces."""
    extra = 0  # the ring's own bytes must be streamed away, too, and what is left of weights that can't be divided
    for _ in range(50):
        plan = lay_out(spread(blocks, total - budget + extra), slots, blocks)
        over = plan.resident_bytes(total) - budget
        if over <= 0:
            return plan
        extra += max(over, total // 1000)
    return None


def spread(blocks: Sequence[Block], need: int) -> list[tuple[str, ...]]:
    """Weights of each block, about as many bytes of each; what one gives too much the next gives less."""
    level = fill(blocks, need)
    pieces: list[tuple[str, ...]] = []
    owed = 0.0
    for block in blocks:
        owed += min(level, block.nbytes)
        chosen: list[str] = []
        for name, size in sorted(block.large.items(), key=lambda item: -item[1]):
            if size <= owed:
                chosen.append(name)
                owed -= size
        rest = [name for name in block.large if name not in chosen]
        if rest and owed > 0.5 * (least := min(block.large[name] for name in rest)):
            chosen.append(min(rest, key=lambda name: block.large[name]))
            owed -= least
        pieces.append(tuple(chosen))
    return pieces


def fill(blocks: Sequence[Block], need: int) -> float:
    """The number of bytes of each block, or all of it where it has fewer, that make up `need`."""
    level, left = 0.0, float(max(0, need))
    sizes = sorted(block.nbytes for block in blocks)
    for index, size in enumerate(sizes):
        level = left / (len(sizes) - index)
        if size >= level:
            return level
        left -= size
    return float(max(sizes, default=0))


def lay_out(pieces: Sequence[tuple[str, ...]], slots: int, blocks: Sequence[Block]) -> StreamPlan:
    """Places in a ring that holds `slots` of the largest piece."""
    sizes = [sum(room(b.weights[name]) for name in piece) for b, piece in zip(blocks, pieces, strict=True)]
    ring = min(sum(sizes), slots * max(sizes, default=0))
    offsets: list[int] = []
    offset = 0
    for size in sizes:
        if offset + size > ring:
            offset = 0
        offsets.append(offset)
        offset += size
    return StreamPlan(tuple(pieces), tuple(offsets), ring, sum(sizes))


def always() -> bool:
    return True


class Ring:
    """The streamed weights of a model on their way; the parameters' `data` are views of the ring while it lives."""

    def __init__(
        self,
        plan: StreamPlan,
        blocks: Sequence[torch.nn.Module],
        parameters: Mapping[str, torch.nn.Parameter | LocalPart],
        host: Mapping[str, torch.Tensor],
        copy_stream: CopyStream,
    ) -> None:
        self.copy_stream = copy_stream
        self.memory = memory_of_its_own(plan.ring_bytes, copy_stream.device)
        copy_stream.expect(host[name] for piece in plan.pieces for name in piece)
        self._copies: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # of each piece: (place in the ring, source)
        self._spans: list[tuple[int, int]] = []
        for piece, start in zip(plan.pieces, plan.offsets, strict=True):
            offset, copies = start, []
            for name in piece:
                place = view_of(self.memory, offset, host[name])
                parameters[name].data = place
                copies.append((place, host[name]))
                offset += room(host[name].nbytes)
            self._copies.append(copies)
            self._spans.append((start, offset))
        self._rivals = [self._overlapping(index) for index in range(len(self._copies))]
        self._arrived: list[Mark | None] = [None] * len(self._copies)  # None: not in the ring, nor on its way
        # Whether the forward that has read a block is the last one to read it in this pass.
        self._last: Callable[[], bool] = always
        self._after: list[list[int]] = [[] for _ in self._copies]  # pieces that may come once a block is done
        for index in range(len(self._copies)):
            if self._copies[index] and (before := self._predecessor(index)) is not None:
                self._after[before].append(index)
        self._hooks = [
            hook
            for index, block in enumerate(blocks)
            for hook in (
                block.register_forward_pre_hook(lambda *_, i=index: self._need(i)),
                block.register_forward_hook(lambda *_, i=index: self._done(i)),
            )
        ]

    def _overlapping(self, index: int) -> list[int]:
        start, end = self._spans[index]
        return [
            other
            for other, (a, b) in enumerate(self._spans)
            if other != index and self._copies[other] and a < end and start < b
        ]

    def _predecessor(self, index: int) -> int | None:
        """The last block before this one, around the ring, that reads where its weights will lie."""
        count = len(self._copies)
        rivals = self._rivals[index]
        return min(rivals, key=lambda other: (index - other) % count) if rivals else None

    def start(self) -> None:
        """Send off the pieces that come first, as far as the ring holds them."""
        begun = self.copy_stream.mark()
        taken: list[int] = []
        for index, copies in enumerate(self._copies):
            if copies:
                if set(self._rivals[index]) & set(taken):
                    return
                taken.append(index)
                if self._arrived[index] is None:
                    self._fetch(index, begun)

    def _fetch(self, index: int, after: Mark) -> None:
        for other in self._rivals[index]:
            self._arrived[other] = None
        self._arrived[index] = self.copy_stream.copy(self._copies[index], after)

    def _need(self, index: int) -> None:
        if not self._copies[index]:
            return
        if (arrived := self._arrived[index]) is None:  # blocks ran in another order than planned
            self._fetch(index, self.copy_stream.mark())
            arrived = self._arrived[index]
        assert arrived is not None
        self.copy_stream.wait(arrived)

    @contextlib.contextmanager
    def shared(self, last: Callable[[], bool]) -> Iterator[None]:
        """Let each block's weights stay until the last of several forwards, which take turns at blocks, has read them.

        `last` tells whether that is the present one.
        """
        self._last = last
        try:
            yield
        finally:
            self._last = always

    def _done(self, index: int) -> None:
        if self._after[index] and self._last():
            done = self.copy_stream.mark()
            for other in self._after[index]:
                self._fetch(other, done)

    def close(self) -> None:
        """Take the hooks off; the weights' places are free once the copy stream is idle."""
        self.copy_stream.expect(())
        for hook in self._hooks:
            hook.remove()

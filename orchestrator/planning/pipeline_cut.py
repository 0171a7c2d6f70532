"""The cut of a denoiser over several GPUs: so that the slowest part of a job is as quick as can be."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.planning.streaming_cost import Load, Streaming, job_seconds, streaming
from protocol.model_profile import StageProfile


@dataclass(frozen=True, slots=True)
class SplitGpu:
    """A GPU that a part may be on."""

    room: int  # bytes, for weights
    flops: float  # FLOP/s
    link: float  # bytes/s, from host memory


@dataclass(frozen=True, slots=True)
class Part:
    """Some blocks in a row on one GPU, and what they do there."""

    blocks: int
    load: Load
    streaming: Streaming
    seconds: float  # a job's


class Stretches:
    """Blocks in a row; the first and the last one of all have with them what is in no block."""

    def __init__(self, profile: StageProfile) -> None:
        self._figures = profile
        blocks = profile.blocks
        rest = profile.weights - sum(block.bytes for block in blocks)
        self._before, self._after = rest - profile.after, profile.after
        small = profile.least - rest - max(block.bytes for block in blocks)  # what is too small to be streamed
        self._small = max(0, small) // len(blocks)
        self._bytes = [0, *itertools.accumulate(block.bytes for block in blocks)]
        self._once = [0, *itertools.accumulate(block.once for block in blocks)]
        self._flop = [0.0, *itertools.accumulate(max(block.flop, 1.0) for block in blocks)]

    def __len__(self) -> int:
        return len(self._figures.blocks)

    def load(self, start: int, end: int) -> Load:
        size, once = self._bytes[end] - self._bytes[start], self._once[end] - self._once[start]
        rest = (0 if start else self._before) + (self._after if end == len(self) else 0)
        least = rest + max(block.bytes for block in self._figures.blocks[start:end]) + self._small * (end - start)
        loose = self._figures.loose if once else 0
        return Load(size + rest, min(least, size + rest), once, loose, size - once, end - start)

    def compute(self, start: int, end: int, gpu: SplitGpu) -> float:
        """Seconds of one run."""
        return (self._flop[end] - self._flop[start]) / gpu.flops

    def part(self, start: int, end: int, gpu: SplitGpu) -> Part | None:
        """Return the part of these blocks; None where they can't even be streamed."""
        load = self.load(start, end)
        how = streaming(load, gpu.room)
        if how is None:
            return None
        _, seconds = job_seconds(self.compute(start, end, gpu), self._figures.passes, how, gpu.link)
        return Part(end - start, load, how, seconds)


def best_cut(profile: StageProfile, gpus: Sequence[SplitGpu]) -> list[Part] | None:
    """The parts, one for each GPU, whose slowest is quickest; None where none fit."""
    stretches = Stretches(profile)
    count = len(stretches)
    # best[k][end]: the slowest part's seconds with the blocks up to `end` on the first k GPUs; where the last begins
    best = [[(math.inf, 0)] * (count + 1) for _ in range(len(gpus) + 1)]
    best[0][0] = (0.0, 0)
    for k, gpu in enumerate(gpus, 1):
        for end in range(k, count + 1):
            for start in range(end - 1, k - 2, -1):
                if stretches.compute(start, end, gpu) * profile.passes >= best[k][end][0]:
                    break  # more blocks take longer
                before = best[k - 1][start][0]
                if before < best[k][end][0] and (part := stretches.part(start, end, gpu)):
                    best[k][end] = min(best[k][end], (max(before, part.seconds), start))
    if math.isinf(best[-1][count][0]):
        return None
    counts, end = [], count
    for k in range(len(gpus), 0, -1):
        start = best[k][end][1]
        counts.append(end - start)
        end = start
    return parts_of(profile, counts[::-1], gpus)


def parts_of(profile: StageProfile, counts: Sequence[int], gpus: Sequence[SplitGpu]) -> list[Part] | None:
    """Return the parts of a given cut; None where one can't be."""
    stretches = Stretches(profile)
    ends = list(itertools.accumulate(counts))
    rows = zip([0, *ends[:-1]], ends, gpus, strict=True)
    found = [stretches.part(start, end, gpu) for start, end, gpu in rows]
    parts = [part for part in found if part]
    return parts if len(parts) == len(found) else None

"""Where to cut a denoiser that is spread over several GPUs: by its blocks' arithmetic, as far as memory allows."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.figures import BlockFigures


@dataclass(frozen=True, slots=True)
class Cut:
    """Blocks and bytes of weights on each GPU, in order."""

    blocks: tuple[int, ...]
    bytes: tuple[int, ...]


def cut_by_compute(
    blocks: Sequence[BlockFigures], rest: int, room: Sequence[int], speeds: Sequence[float]
) -> Cut | None:
    """The contiguous cut whose slowest part is quickest; None where none fits `room`, in bytes of each GPU.

    `rest` are bytes of what is in no block, which lie on the first GPU. `speeds` are FLOP/s. Every GPU gets a block.
    """
    count, parts = len(blocks), len(room)
    sizes, work = [0], [0.0]
    for block in blocks:
        sizes.append(sizes[-1] + block.bytes)
        work.append(work[-1] + max(block.flop, 1.0))
    # best[k][i]: the slowest part's seconds with the first i blocks on the first k GPUs; where the last of them begins
    best = [[(math.inf, 0)] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = (0.0, 0)
    for k in range(1, parts + 1):
        extra = rest if k == 1 else 0
        for end in range(k, count + 1):
            for start in range(k - 1, end):
                if sizes[end] - sizes[start] + extra <= room[k - 1]:
                    slowest = max(best[k - 1][start][0], (work[end] - work[start]) / speeds[k - 1])
                    best[k][end] = min(best[k][end], (slowest, start))
    if math.isinf(best[parts][count][0]):
        return None
    ends = [count]
    for k in range(parts, 0, -1):
        ends.append(best[k][ends[-1]][1])
    spans = list(itertools.pairwise(reversed(ends)))
    taken = [sizes[after] - sizes[before] for before, after in spans]
    return Cut(tuple(after - before for before, after in spans), (taken[0] + rest, *taken[1:]))

"""How much of a model must be streamed through a GPU that doesn't hold it, and what that costs: by arithmetic.

`workers.streaming` decides it weight by weight, once there are weights; this is what it comes to.
"""

from dataclasses import dataclass

from protocol.figures import StageFigures

RING_SLOTS = (8, 4, 3, 2, 1)  # pieces that are on their way or in use at once
LARGEST_RING = 1 / 24  # of a model's bytes, where there is a choice
OVERLAP = 0.04  # of the shorter one of computing and copying that the other doesn't hide: measured


@dataclass(frozen=True, slots=True)
class Streaming:
    """Bytes that pass through each time the model runs, and, of layers that act on the timestep alone, once a job."""

    a_pass: float
    once: int

    @property
    def nothing(self) -> bool:
        return not self.a_pass and not self.once


NOTHING = Streaming(0.0, 0)


def streaming(figures: StageFigures, budget: int) -> Streaming | None:
    """What a stage must stream with `budget` bytes for its weights; None where even that is too little."""
    if figures.weights <= budget:
        return NOTHING
    if budget < figures.least:
        return None
    once = figures.once
    total = figures.weights - once + figures.loose
    if total <= budget:
        return Streaming(0.0, once)
    blocks = len(figures.blocks)
    most = sum(block.bytes - block.once for block in figures.blocks)
    fitting: list[tuple[float, float]] = []  # (ring, a pass)
    for slots in (slots for slots in RING_SLOTS if slots < blocks):
        a_pass = (total - budget) / (1 - slots / blocks)
        if a_pass <= most:
            fitting.append((a_pass * slots / blocks, a_pass))
    small = next((a_pass for ring, a_pass in fitting if ring <= LARGEST_RING * total), None)
    return Streaming(small or min((a_pass for _, a_pass in fitting), default=float(most)), once)


def pass_seconds(compute: float, streamed: float, link: float) -> float:
    """Of one run of a model that computes for so long while so many bytes come over the link."""
    copying = streamed / link
    return max(compute, copying) + OVERLAP * min(compute, copying)

"""The part of a model that must be streamed through a GPU that doesn't hold it, and its cost: by arithmetic.

`workers.weights.streaming` decides it weight by weight, once there are weights; this is what it comes to.
"""

from dataclasses import dataclass

from protocol.model_profile import StageProfile

RING_SLOTS = (8, 4, 3, 2, 1)  # pieces that are on their way or in use at once
LARGEST_RING = 1 / 24  # of a model's bytes, where there is a choice
SLOTS_OF_A_SMALL_RING = 3
MOST_FOR_SLOTS = 1.1  # times what must be streamed at least, for a ring of so many
# How well copies and computing hide each other: worst where they take equally long. Fitted to FLUX.1-dev on an H100 and
# an H200 in 16, 12 and 8 GiB, where copying takes from 0.3 to 1.4 of the time of computing (2026-11-26).
SHARPNESS = 5.0


@dataclass(frozen=True, slots=True)
class Streaming:
    """Bytes that pass through each time the model runs, and, of layers that act on the timestep alone, once a job."""

    a_pass: float
    once: int

    @property
    def nothing(self) -> bool:
        return not self.a_pass and not self.once


NOTHING = Streaming(0.0, 0)


@dataclass(frozen=True, slots=True)
class Load:
    """Weights that are to be on one GPU, in bytes."""

    weights: int
    least: int  # where as much of them as can be is streamed
    once: int  # of them, what is run once a job where memory is short
    loose: int  # of the buffer for that
    most: int  # that can pass through each time, besides
    blocks: int


def load_of(profile: StageProfile) -> Load:
    """Return the load of all of a stage's weights."""
    most = sum(block.bytes - block.once for block in profile.blocks)
    return Load(profile.weights, profile.least, profile.once, profile.loose, most, len(profile.blocks))


def streaming(load: Load, budget: int) -> Streaming | None:
    """Return what must be streamed with `budget` bytes for the weights; None where even that is too little."""
    if load.weights <= budget:
        return NOTHING
    if budget < load.least:
        return None
    total = load.weights - load.once + load.loose
    if total <= budget:
        return Streaming(0.0, load.once)
    passes = {slots: (total - budget) / (1 - slots / load.blocks) for slots in RING_SLOTS if slots < load.blocks}
    fitting = {slots: a_pass for slots, a_pass in passes.items() if a_pass <= load.most}
    least = min(fitting.values(), default=float(load.most))
    for slots, a_pass in fitting.items():
        small = a_pass * slots / load.blocks <= LARGEST_RING * total
        if small or (slots == SLOTS_OF_A_SMALL_RING and a_pass <= MOST_FOR_SLOTS * least):
            return Streaming(a_pass, load.once)
    return Streaming(least, load.once)


def job_seconds(compute: float, passes: int, how: Streaming, link: float, together: int = 1) -> tuple[float, float]:
    """Seconds of one run of a model that computes for so long, and of all those that a job makes.

    In all steps but the first the weights pass once for so many runs `together`.
    """
    alone = pass_seconds(compute, how.a_pass, link)
    shared = pass_seconds(compute * together, how.a_pass, link) / together
    first = min(together, passes)
    return shared, alone * first + shared * (passes - first) + max(0.0, how.once / link - alone)


def pass_seconds(compute: float, streamed: float, link: float) -> float:
    """Return the seconds of one run that computes for so long while so many bytes come over the link."""
    copying = streamed / link
    longer, shorter = max(compute, copying), min(compute, copying)
    return longer * (1 + (shorter / longer) ** SHARPNESS) ** (1 / SHARPNESS) if longer else 0.0

"""Jobs, what came of them, and what they cost on a card, the same for all ways to do them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.memory.margins import HEADROOM
from orchestrator.planning.hardware import Card, Hardware
from orchestrator.planning.prediction import Book, Terms
from orchestrator.planning.streaming_cost import job_seconds, load_of, streaming
from protocol.model_profile import ModelProfile, StageProfile
from protocol.stages import STAGES, Stage


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds
    cached: bool  # its prompt's embeddings are known


@dataclass(slots=True)
class Tally:
    """The outcome of a trace."""

    waits: list[float] = field(default_factory=list)  # seconds from a job's arrival to its denoiser's first step
    times: list[tuple[float, float]] = field(default_factory=list)  # (arrival, end) of each job
    busy: float = 0.0  # GPU seconds of computing
    again: float = 0.0  # of them, of what had been computed before
    swaps: int = 0
    swapping: float = 0.0  # GPU seconds
    hosts: list[tuple[float, int]] = field(default_factory=list)  # (seconds, hosts that are paid for from then on)

    def host_hours(self, end: float) -> float:
        """Return the hours of all hosts together until `end`."""
        spans = itertools.pairwise([*self.hosts, (end, 0)])
        return sum((min(end, until) - at) * count for (at, count), (until, _) in spans if at < end) / 3600


def task_seconds(profile: StageProfile, card: Card, weights: int, compiled: bool) -> float:
    """Return the seconds of a task with so many bytes for weights."""
    how = streaming(load_of(profile), weights)
    assert how is not None
    compute = profile.flop / card.flops(profile.stage, compiled)
    return job_seconds(compute, profile.passes, how, card.rate.link, profile.together)[1]


def swap_and_run(profile: ModelProfile, card: Card, stage: Stage, workspace: int, terms: Terms) -> tuple[float, float]:
    """Seconds to bring a stage in alone on a card, beside the contexts of all three, and of its task then."""
    mine = profile.stage(stage)
    weights = min(mine.weights, card.budget - len(STAGES) * (card.rate.context + HEADROOM) - workspace)
    return weights / card.rate.link, task_seconds(mine, card, weights, terms.compiled)


def costs_alone(profile: ModelProfile, hardware: Hardware, terms: Terms) -> Sequence[dict[Stage, tuple[float, float]]]:
    """Return `swap_and_run` for each card and stage."""
    book = Book(profile, hardware, (), terms)
    known: dict[tuple[str, int], dict[Stage, tuple[float, float]]] = {}
    for card in hardware.cards:
        if (card.name, card.budget) not in known:
            known[card.name, card.budget] = {
                stage: swap_and_run(profile, card, stage, book.workspace(stage, card), terms) for stage in STAGES
            }
    return [known[card.name, card.budget] for card in hardware.cards]

"""Counts of what happens to jobs and leases, for metrics: a sum a kind, and distributions of seconds."""

import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from orchestrator.dispatch.transitions import (
    Claimed,
    EmbeddingsKnown,
    Event,
    Failed,
    HandedBack,
    HandedOut,
    InputLost,
    ShortOfMemory,
    StageDone,
)
from orchestrator.job import LiveJob
from orchestrator.principal import KeyHolder
from protocol.metrics import Metric, Sample
from protocol.stages import Stage

LIMITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)  # seconds
SHORT_LIMITS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)  # seconds
RECOVERIES = {
    Failed: "failed", HandedBack: "handed_back", Claimed: "claimed", InputLost: "input_lost",
    ShortOfMemory: "short_of_memory",
}  # fmt: skip
Labels = tuple[str, ...]


class Distribution:
    """How often something took how long."""

    def __init__(self, limits: Sequence[float] = LIMITS) -> None:
        self._limits = limits
        self.counts, self.sum = [0] * (len(limits) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self._limits, seconds)] += 1
        self.sum += seconds

    def sample(self, labels: Labels) -> Sample:
        return Sample(labels=labels, value=self.sum, counts=tuple(self.counts))


class Counters:
    """Counts since this orchestrator was started. `name_of` a job is its model's name in the stack."""

    def __init__(self, name_of: Callable[[LiveJob], str]) -> None:
        self._name_of = name_of
        self._jobs: Counter[Labels] = Counter()  # by end, model and kind of owner
        self._recoveries: Counter[Labels] = Counter()  # by stage and why
        self._swaps: Counter[Labels] = Counter()  # by stage
        self._streamed: Counter[Labels] = Counter()  # bytes by stage
        self._cached = 0
        self._wait = Distribution()
        self._decisions = Distribution(SHORT_LIMITS)
        self._stages: dict[Labels, Distribution] = {}  # by stage and model
        self._whole: dict[str, Distribution] = {}  # by model

    def happened(self, before: LiveJob, event: Event, after: LiveJob, now: float) -> None:
        """Count what an event has made of a job; `now` in seconds since the epoch."""
        match event:
            case HandedOut() if before.attempts == 0:
                self._wait.add(max(0.0, now - before.created))
            case StageDone(record=record):
                place = record.stage, self._name_of(before)
                self._stages.setdefault(place, Distribution()).add(record.seconds)
            case EmbeddingsKnown():
                self._cached += 1
            case Failed() | HandedBack() | Claimed() | InputLost() | ShortOfMemory() if not after.ended:
                self._recoveries[before.stage, RECOVERIES[type(event)]] += 1
        if after.ended and not before.ended:
            model = self._name_of(before)
            self._jobs[after.state, model, "key" if isinstance(after.owner, KeyHolder) else "local"] += 1
            if after.state == "done" and after.finished is not None:
                self._whole.setdefault(model, Distribution()).add(after.finished - after.created)

    def swapped(self, stage: Stage) -> None:
        """Count weights that have come in by a lease."""
        self._swaps[(stage,)] += 1

    def streamed(self, stage: Stage, size: int) -> None:
        """Count bytes of weights that have passed through a GPU."""
        self._streamed[(stage,)] += size

    def decided(self, seconds: float) -> None:
        """Count a look for what is to be done next."""
        self._decisions.add(seconds)

    def metrics(self) -> tuple[Metric, ...]:
        return (
            counter("jobs_total", "jobs that have ended", ("state", "model", "owner"), self._jobs),
            counter(
                "recoveries_total", "tasks that are done again, or gone on with", ("stage", "why"), self._recoveries
            ),
            counter("swaps_total", "times that weights came into a GPU by a lease", ("stage",), self._swaps),
            counter(
                "streamed_bytes_total", "bytes of weights that passed through a GPU, about", ("stage",), self._streamed
            ),
            counter("cached_prompts_total", "prompts whose embeddings were known", (), Counter({(): self._cached})),
            seconds("queue_wait_seconds", "from a job's acceptance to its first task", (), {(): self._wait}),
            seconds("decision_seconds", "a look for what workers do next", (), {(): self._decisions}, SHORT_LIMITS),
            seconds("stage_seconds", "a visit of a stage", ("stage", "model"), self._stages),
            seconds(
                "job_seconds", "from acceptance to pictures", ("model",), {(m,): d for m, d in self._whole.items()}
            ),
        )


def counter(name: str, what: str, labels: Labels, counts: "Counter[Labels]") -> Metric:
    samples = tuple(Sample(labels=values, value=float(count)) for values, count in sorted(counts.items()))
    return Metric(name=name, kind="counter", what=what, labels=labels, samples=samples)


def seconds(
    name: str, what: str, labels: Labels, found: Mapping[Labels, Distribution], limits: Sequence[float] = LIMITS
) -> Metric:
    samples = tuple(distribution.sample(values) for values, distribution in sorted(found.items()))
    return Metric(name=name, kind="histogram", what=what, labels=labels, limits=tuple(limits), samples=samples)

"""Workers as a plan sees them, and what they come to together: the time of one job, and the pace of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.planning.placement import Post
from protocol.stages import STAGES, TRAITS

Residency = Literal["in", "streamed", "turns", "borrows", "host"]
OVERHEAD_SECONDS = 0.07  # of a job outside its stages: messages, disks, the PNG
SPLIT_EFFICIENCY = 0.95  # of GPUs that work on parts of several jobs; not measured yet


@dataclass(frozen=True, slots=True)
class GpuUse:
    """A worker's use of one GPU, in bytes."""

    gpu: int
    weights: int
    workspace: int
    context: int


@dataclass(frozen=True, slots=True)
class PlannedWorker:
    """A worker and how it will do."""

    post: Post
    shares: tuple[GpuUse, ...]
    residency: Residency
    streamed: float  # bytes a pass, to each of its GPUs
    pass_seconds: float
    seconds: float  # a job's stage, once it is there
    swap_seconds: float = 0.0  # to bring its weights in, where it must take turns or borrows memory
    starting: float = 0.0  # seconds of its host's for a job, which jobs at once take one after the other
    busy: tuple[float, ...] = ()  # seconds a job on each of its GPUs, where they work one after the other

    def busy_on(self, gpu: int) -> float:
        """Seconds that a GPU is busy with a job."""
        return self.busy[self.post.gpus.index(gpu)] if self.busy else self.seconds


def latency(work: Sequence[PlannedWorker]) -> float:
    """Seconds of one job in a stack that waits for it: the quickest worker of each stage, its swap included."""
    total = OVERHEAD_SECONDS
    for stage in STAGES:
        mine = [one.seconds + one.swap_seconds for one in work if one.post.stage == stage]
        total += min(mine, default=0.0)
    return total


def steady_state(work: Sequence[PlannedWorker], patience: float) -> float:
    """Seconds between two jobs with many in the queue, each GPU as busy as the others let it be."""
    load: dict[int, float] = {}  # seconds a job by GPU, of the stages beside the denoiser
    limits: list[float] = []  # jobs a second of what has no GPU
    for stage in STAGES:
        mine = [one for one in work if one.post.stage == stage]
        if stage != "denoise":
            for one in mine:
                for gpu in one.post.gpus:
                    load[gpu] = load.get(gpu, 0.0) + (one.seconds + turn_seconds(one, work, patience)) / len(mine)
        here = [one for one in mine if not one.post.gpus and one.seconds]
        if here and len(here) == len(mine):
            limits.append(sum(1 / one.seconds for one in here))
    denoisers = [one for one in work if one.post.stage == "denoise"]
    sharing: dict[int, int] = {}
    for one in denoisers:
        for gpu in one.post.gpus:
            sharing[gpu] = sharing.get(gpu, 0) + 1

    def possible(rate: float) -> bool:
        if any(rate > limit for limit in limits) or any(rate * seconds > 1 for seconds in load.values()):
            return False
        done = 0.0
        for one in denoisers:
            if not one.post.gpus:
                done += 1 / one.seconds
                continue
            parts = []
            for gpu in one.post.gpus:
                busy = one.busy_on(gpu) / (SPLIT_EFFICIENCY if one.busy else 1.0) + turn_seconds(one, work, patience)
                parts.append((1 - rate * load.get(gpu, 0.0)) / sharing[gpu] / busy)
            if one.starting:
                parts.append(1 / one.starting)
            done += min(parts)
        return not denoisers or done >= rate

    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if possible(middle) else (low, middle)
    return 1 / low if low else float("inf")


def turn_seconds(one: PlannedWorker, work: Sequence[PlannedWorker], patience: float) -> float:
    """Return the seconds of swapping for each job: a turn is as many jobs as come together in `patience`.

    What comes after denoising borrows for each job anew, what comes before it for many.
    """
    each = one.residency == "borrows" and TRAITS[one.post.stage].distance < TRAITS["denoise"].distance
    if not one.swap_seconds or each:
        return one.swap_seconds
    denoisers = [other.seconds for other in work if other.post.stage == "denoise" and other.seconds]
    return one.swap_seconds / max(1.0, patience / min(denoisers, default=patience))

"""The worker processes that there are to be, and the GPUs that each uses: all that a configuration leaves open.

Pure: it knows how many GPUs there are, nothing of what fits them. `plan` judges what is offered here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from typing import Literal

from orchestrator.settings import Placement, StackConfig, StageConfig
from protocol.stages import STAGES, Stage

# leases: of one GPU. own: a fixed part of one. host: no GPU that a stack knows. The others: one model on several GPUs.
Kind = Literal["leases", "own", "split", "tensor", "context", "host"]
SEVERAL: tuple[Kind, ...] = ("split", "tensor", "context")
FEW_CARDS = 4  # up to which every choice of cards is looked at


@dataclass(frozen=True, slots=True)
class Post:
    """A worker process. `memory` is in bytes of each of its GPUs, and empty where it works in leases of one GPU."""

    stage: Stage
    kind: Kind
    device: str  # cuda, cpu or mps, or auto where nothing is known
    gpus: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()  # of a denoiser that is split: blocks on each GPU; none: as its memory allows
    workspace: int = 0  # bytes to be left of the memory, beside weights; 0: whoever loads them knows
    given: bool = False  # its memory is as configured
    locked: int | None = None  # bytes of its weights that it may page-lock in the host's memory; None: all

    @property
    def jobs(self) -> int:
        """The number of its tasks at once: of a denoiser that is cut one for each part, so that no GPU waits."""
        return len(self.gpus) if self.cut else 1

    @property
    def leased(self) -> bool:
        """Return whether its memory is lent: it gives it back when it has long been idle, or others need it more."""
        together = self.kind in ("tensor", "context") or bool(self.cut)
        return self.kind == "leases" or (together and bool(self.memory) and not self.given)

    @property
    def kept(self) -> tuple[int, ...]:
        """Bytes of each of its GPUs that no other worker is ever lent."""
        return () if self.leased else self.memory


Posts = tuple[Post, ...]


@dataclass(frozen=True, slots=True)
class StageGpus:
    """The GPUs that a stage may use, and as what kind of device."""

    device: str
    gpus: tuple[int, ...]
    chosen: bool  # by whoever configured it, so that all of them are to be used


def stand_ins(config: StackConfig) -> tuple[int, ...]:
    """GPUs whose part a CPU plays."""
    return tuple(sorted({gpu for stage in STAGES for gpu in _stands_in(config.stage(stage))}))


def _stands_in(stage: StageConfig) -> tuple[int, ...]:
    kind, _, numbers = stage.device.partition(":")
    return tuple(map(int, numbers.split(","))) if kind == "cpu" and numbers else ()


def stage_gpus(stage: StageConfig, cards: Sequence[int]) -> StageGpus:
    """Find the GPUs that a stage may use; `cards` are the driver's GPUs."""
    kind, _, numbers = stage.device.partition(":")
    if kind == "cpu" and numbers:
        return StageGpus("cpu", _stands_in(stage), True)
    if kind == "cuda" and numbers:
        return StageGpus("cuda", (int(numbers),), True)
    if kind == "cuda" or (kind == "auto" and cards):
        return StageGpus("cuda", stage.gpus if stage.gpus is not None else tuple(cards), stage.gpus is not None)
    return StageGpus(kind, (), True)


def candidates(
    config: StackConfig, cards: Sequence[int], several: Sequence[Kind], counts: dict[Stage, int]
) -> Iterator[Posts]:
    """Every placement worth a look; `several` are the kinds of a denoiser on more than one GPU that may be.

    `counts` says how many workers a stage without a number of its own is to have beside many denoisers.
    """
    choices = [stage_choices(config, stage, cards, several, counts.get(stage, 1)) for stage in STAGES]
    for chosen in product(*choices):
        yield tuple(chain.from_iterable(chosen))


def stage_choices(
    config: StackConfig, stage: Stage, cards: Sequence[int], several: Sequence[Kind], count: int
) -> list[Posts]:
    settings = config.stage(stage)
    where = stage_gpus(settings, cards)
    workers = settings.workers
    if workers == 0:
        return [()]
    if not where.gpus:
        return [(Post(stage, "host", where.device),) * (workers or 1)]
    if settings.max_memory:
        kind: Kind = "own" if len(where.gpus) == 1 else "split"
        amounts = settings.max_memory if len(settings.max_memory) > 1 else settings.max_memory * len(where.gpus)
        return [(Post(stage, kind, where.device, where.gpus, amounts, given=True),) * (workers or 1)]
    if stage == "denoise":
        return denoise_choices(config.placement, where, workers, several)
    number = workers or count
    if len(where.gpus) <= FEW_CARDS:
        starts: Sequence[int] = range(len(where.gpus))
    else:  # the first ones for one of the two, the last ones for the other
        starts = [0 if stage == "text" else len(where.gpus) - number]
    return [
        leased(stage, where, [where.gpus[(start + i) % len(where.gpus)] for i in range(number)]) for start in starts
    ]


def denoise_choices(
    placement: Placement, where: StageGpus, workers: int | None, several: Sequence[Kind]
) -> list[Posts]:
    gpus, found = where.gpus, []
    if placement in ("auto", "replicas"):
        for chosen in [gpus] if where.chosen or len(gpus) > FEW_CARDS else subsets(gpus):
            found.append(leased("denoise", where, [chosen[i % len(chosen)] for i in range(workers or len(chosen))]))
    if len(gpus) > 1 or placement in SEVERAL:
        kinds = several if placement == "auto" else [kind for kind in SEVERAL if kind == placement]
        found += [
            tuple(Post("denoise", kind, where.device, group) for group in groups)
            for kind, groups in product(kinds, groupings(gpus, workers))
        ]
    return found


def groupings(gpus: Sequence[int], workers: int | None) -> list[tuple[tuple[int, ...], ...]]:
    """Return the ways to give each of some workers GPUs of its own: equal numbers of neighbours, at least two.

    Without a number of workers there is a way for each that can be; where one can't be, all of them use all GPUs.
    """
    numbers = [workers] if workers else range(1, len(gpus) // 2 + 1)
    found = []
    for number in numbers:
        size, rest = divmod(len(gpus), number)
        if size > 1 and not rest:
            found.append(tuple(tuple(gpus[start : start + size]) for start in range(0, len(gpus), size)))
    return found or [(tuple(gpus),) * (workers or 1)]


def leased(stage: Stage, where: StageGpus, gpus: Sequence[int]) -> Posts:
    return tuple(Post(stage, "leases", where.device, (gpu,)) for gpu in gpus)


def subsets(gpus: Sequence[int]) -> list[tuple[int, ...]]:
    """Return all subsets but the empty one, the larger ones first."""
    return [chosen for size in range(len(gpus), 0, -1) for chosen in combinations(gpus, size)]


def another(posts: Sequence[Post], stage: Stage, index: int) -> Post:
    """Choose the place of a stage's next worker, of which there are `index`: those of the ones before, in turn."""
    mine = [post for post in posts if post.stage == stage]
    return mine[index % len(mine)] if mine else Post(stage, "host", "auto")


def with_memory(post: Post, memory: Sequence[int], cut: Sequence[int] = (), workspace: int = 0) -> Post:
    return replace(post, memory=tuple(memory), cut=tuple(cut), workspace=workspace)


def speedups_of(posts: Sequence[Post]) -> tuple[str, ...]:
    """Return what of a placement changes bits, as speedups.py writes it."""
    return tuple({f"denoise:parallel={p.kind}-{len(p.gpus)}" for p in posts if p.kind in ("tensor", "context")})

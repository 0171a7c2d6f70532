"""The outcome of a stage, and the reports of its progress."""

from dataclasses import dataclass
from typing import Any, Protocol

from protocol.pictures import PICTURES
from protocol.stages import Stage
from protocol.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint, after `step` steps."""

    step: int
    tensors: list[Tensor]


class Report(Protocol):
    def __call__(self, step: int, steps: int, saved: Saved | None = None) -> None:
        """Report that `step` of `steps` steps are done; a checkpoint may come along, of this step or the one before.

        Raises Cancelled at a step boundary.
        """


class Watcher(Protocol):
    """Looks at a job's latents while it is denoised."""

    def see(self, pipeline: Any, step: int, latents: Any) -> None:
        """Look at the latents after a step of a loop, counted from 0."""

    def left(self) -> list[Tensor]:
        """Return what the next stage is to have of it."""


def watcher_of(report: Report) -> Watcher | None:
    """Return who watches a job, where somebody comes with its report."""
    return getattr(report, "watcher", None)


def unheard(step: int, steps: int, saved: Saved | None = None) -> None:
    """A report that nobody wants."""


@dataclass(frozen=True, slots=True)
class Outcome:
    tensors: list[Tensor]
    next: Stage | None = None  # the stage to visit; None: these are the job's pictures
    warnings: tuple[str, ...] = ()
    wants: str = ""  # the call that the next stage is to make, such as `vae.encode`
    calls: int = 0  # whose results it holds
    alone: bool = True  # it was made for itself, so that its time and memory tell what such a task takes

    @property
    def parts(self) -> int:
        """Parts of the pictures after the first one, which travel on their own."""
        return 0 if self.next else max(0, sum(tensor.name == PICTURES for tensor in self.tensors) - 1)

"""What a stage gives back, and how it tells how far it is."""

from dataclasses import dataclass
from typing import Protocol

import torch

from protocol.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint, after `step` steps."""

    step: int
    tensors: list[Tensor]


class Report(Protocol):
    def __call__(self, step: int, steps: int, saved: Saved | None = None) -> None:
        """So many steps of so many are done; a checkpoint may come along, of this step or the one before.

        Raises Cancelled at a step boundary.
        """


def unheard(step: int, steps: int, saved: Saved | None = None) -> None:
    """A report that nobody wants."""


def release_memory() -> None:
    """After running out of memory: what the failed try left is free for the next one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Cancelled(Exception):
    """Somebody no longer wants the task."""


class StageError(Exception):
    """A stage can't do its task, and trying again would give the same."""


@dataclass(frozen=True, slots=True)
class Outcome:
    tensors: list[Tensor]
    warnings: tuple[str, ...] = ()


def cause_of(error: BaseException) -> str:
    """One line that names what went wrong, down to the first cause."""
    parts = [f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":")]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(f"because of {type(error).__name__}: {error}".splitlines()[0])
    if isinstance(error, torch.OutOfMemoryError):
        parts.append(
            "a smaller picture, fewer a job, or more memory for this stage (--budget, --max-memory) would help"
        )
    return "; ".join(parts)[:2000]

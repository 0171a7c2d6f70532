"""What a stage gives back, and how it tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from protocol.tensors import Tensor

Report = Callable[[int, int], None]  # (steps done, steps in all); raises Cancelled at a step boundary


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

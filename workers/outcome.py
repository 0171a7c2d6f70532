"""What a stage gives back, and how it tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from protocol.tensors import Tensor

Report = Callable[[int, int], None]  # (steps done, steps in all); raises Cancelled at a step boundary


class Cancelled(Exception):
    """Somebody no longer wants the task."""


class StageError(Exception):
    """A stage can't do its task, and trying again would give the same."""


@dataclass(frozen=True, slots=True)
class Outcome:
    tensors: list[Tensor]
    warnings: tuple[str, ...] = ()

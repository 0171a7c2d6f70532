"""Errors of a stage's task, and one line for each."""

import traceback

import torch


def release_memory() -> None:
    """Free what a try that ran out of GPU memory has left, for the next one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def refusals() -> int:
    """Return how often GPU memory was asked for and not there; cuDNN asks, and takes another algorithm instead."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    return sum(torch.cuda.memory_stats(gpu).get("num_ooms", 0) for gpu in gpus)


class Forgiven:
    """Refusals of GPU memory in a try whose results were thrown away, for what was done anew with less at once."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, since: int) -> None:
        """Add those that came since there were so many."""
        self._count += refusals() - since

    def pop(self) -> int:
        """Return them, and forget them."""
        count, self._count = self._count, 0
        return count


FORGIVEN = Forgiven()


class Cancelled(Exception):
    """Somebody no longer wants the task."""


class WeightsLost(Exception):
    """A copy of weights was not made, so nothing on the GPU can be relied on: the process has to start anew."""


class StageError(Exception):
    """A stage can't do its task, and trying again would give the same."""


def let_go(error: BaseException) -> None:
    """Let go of what an error's traceback holds: tensors on GPUs, and a collection of garbage may be far away."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = None


NO_HOST_MEMORY = (  # in errors of libraries; the last one is oneDNN's
    "bad_alloc", "can't start new thread", "can't allocate memory", "could not create a primitive",
)  # fmt: skip


def found_no_host_memory(error: BaseException) -> bool:
    """Return whether an error, or what caused it, says that its host gave this process no more memory."""
    known = isinstance(error, MemoryError) or any(sign in str(error) for sign in NO_HOST_MEMORY)
    return known or (error.__cause__ is not None and found_no_host_memory(error.__cause__))


def cause_of(error: BaseException) -> str:
    """Return one line that names what went wrong, down to the first cause."""
    parts = [f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":")]
    while error.__cause__ is not None:
        error = error.__cause__
        parts.append(f"because of {type(error).__name__}: {error}".splitlines()[0])
    if isinstance(error, torch.OutOfMemoryError):
        parts.append(
            "a smaller picture, fewer a job, or more memory for this stage (--budget, --max-memory) would help"
        )
    elif found_no_host_memory(error):
        parts.append("this process found no more memory on its host; a smaller picture, or fewer a job, would help")
    return "; ".join(parts)[:2000]

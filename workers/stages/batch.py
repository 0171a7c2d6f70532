"""Several denoising jobs at once, with a batch for each forward: faster for small pictures, and equal but for rounding.

Each job runs the pipeline's own call in turns with the others, up to its denoiser's next forward; once all are there,
their arguments are put together along the batch, and each gets its part of the result. What can't be put together is
run one after the other.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import release_memory
from workers.models.loading import Loaded
from workers.stages.contract import Outcome, Report, unheard
from workers.stages.denoise import DenoiseStage
from workers.weights.forward_trace import Call, same, standing_in
from workers.weights.lockstep import LANE, Lockstep

log = logging.getLogger(__name__)


class BatchedDenoiseStage(DenoiseStage):
    """A denoise stage that takes along jobs which come next."""

    def __init__(self, loaded: Loaded, device: torch.device, checkpoint_seconds: float | None = None) -> None:
        super().__init__(loaded, device, checkpoint_seconds)
        self.ahead: Sequence[tuple[Recipe, tuple[Tensor, ...]]] = ()
        self._lockstep = Lockstep([], device)
        self._others: list[DenoiseStage] = []  # the same model in a pipeline for each job at once
        self._made: dict[Recipe, Outcome] = {}  # ahead

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return what DenoiseStage does; what is made for the jobs that were taken along is kept until they come."""
        if made := self._made.pop(recipe, None):
            return made
        if not self.ahead or any(getattr(one, "is_cache_enabled", False) for one in self.denoisers()):
            return super().run(recipe, tensors, report)
        count = 1 + len(self.ahead)
        self._others += [DenoiseStage(self.loaded.another(), self.device) for _ in range(count - len(self._others))]
        first, *others = self._others[:count]
        first.checkpoint_seconds = self.checkpoint_seconds
        works = [functools.partial(first.denoise, recipe, tensors, report)]
        for stage, (other, its) in zip(others, self.ahead, strict=True):
            works.append(functools.partial(stage.denoise, other, its, unheard))
        with contextlib.ExitStack() as stack:
            for residency in self.residencies:
                stack.enter_context(residency.job(None))
            for name, denoiser in self.loaded.components.items():
                if denoiser in self.denoisers():
                    batches = Batches(self._lockstep, denoiser.forward)
                    for stage in self._others[:count]:
                        stack.enter_context(standing_in(stage.loaded.components[name], batches))
            outcome, outcomes = self._lockstep.run(works, [])
        recipes = [other for other, _ in self.ahead]
        self._made = {other: made for other, made in zip(recipes, outcomes, strict=True) if made}
        return outcome


class Batches:
    """The forward of a denoiser for several jobs: each call waits until the others have come to theirs, or ended."""

    def __init__(self, lockstep: Lockstep, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # for pipelines that look at its parameters
        self._lockstep, self._forward = lockstep, forward
        self._calls: dict[int, Call] = {}  # by lane
        self._results: dict[int, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lane = LANE.get()
        if lane is None:
            return self._forward(*args, **kwargs)
        self._calls[lane] = Call(args, kwargs)
        self._lockstep.pass_on()
        if lane not in self._results:
            self._run(lane)
        return self._results.pop(lane)

    def _run(self, lane: int) -> None:
        lanes = sorted(self._calls)
        calls = [self._calls[one] for one in lanes]
        together = put_together(calls) if len(calls) > 1 else None
        if together:
            try:
                result = self._forward(*together.args, **together.kwargs)
                self._results |= {one: share_of(result, n, len(lanes)) for n, one in enumerate(lanes)}
                self._calls.clear()
                return
            except torch.OutOfMemoryError as error:
                log.warning("no memory for %d jobs at once: %s", len(lanes), error)
            release_memory()
        call = self._calls.pop(lane)
        self._results[lane] = self._forward(*call.args, **call.kwargs)


class Unlike(Exception):
    """Not an error: arguments that no batch can have."""


def put_together(calls: Sequence[Call]) -> Call | None:
    """Return one call whose results are those of all, one after the other along the batch; None if there is none."""
    first = calls[0]
    if any(len(call.args) != len(first.args) or call.kwargs.keys() != first.kwargs.keys() for call in calls):
        return None
    samples = samples_of(first)
    try:
        args = tuple(joined([call.args[place] for call in calls], samples) for place in range(len(first.args)))
        return Call(args, {name: joined([call.kwargs[name] for call in calls], samples) for name in first.kwargs})
    except Unlike:
        return None


def samples_of(call: Call) -> int:
    """Return the length of a call's batch, guidance included: that of its latents, or of a list of them."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim >= 3:
            return value.shape[0]
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return len(value)
    return 0


def joined(values: Sequence[Any], samples: int) -> Any:
    """Return several jobs' values of an argument as a batch's; Unlike. What is no batch must be equal."""
    first = values[0]
    if any(type(one) is not type(first) for one in values):
        raise Unlike
    match first:
        case torch.Tensor() if first.ndim and first.shape[0] == samples:
            if any((one.shape, one.dtype) != (first.shape, first.dtype) for one in values):
                raise Unlike
            return torch.cat(list(values))
        case list() if len(first) == samples:
            if any(len(one) != samples for one in values):
                raise Unlike
            return [item for one in values for item in one]
        case dict():
            if any(one.keys() != first.keys() for one in values):
                raise Unlike
            return {name: joined([one[name] for one in values], samples) for name in first}
    if not all(same(one, first) for one in values[1:]):
        raise Unlike
    return first


def share_of(result: Any, number: int, count: int) -> Any:
    """Return one job's part of a batch's result, of which there are so many."""
    match result:
        case torch.Tensor() if result.ndim and not result.shape[0] % count:
            size = result.shape[0] // count
            return result[number * size : (number + 1) * size]
        case list() if result and not len(result) % count:
            size = len(result) // count
            return result[number * size : (number + 1) * size]
        case tuple():
            return tuple(share_of(part, number, count) for part in result)
        case BaseOutput():
            return type(result)(**{name: share_of(part, number, count) for name, part in result.items()})
    return result

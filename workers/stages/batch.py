"""Several denoising jobs at once, with a batch for each forward: faster for small pictures, and equal but for rounding.

Each job runs the pipeline's own call in turns with the others, up to its denoiser's next forward; once all are there,
their arguments are put together along the batch, and each gets its part of the result. Where they can't be put
together, the first job is begun anew, alone; so is every job of a pipeline whose first batch gave other results than
its jobs alone, as where a denoiser treats the places in a batch in different ways.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils import BaseOutput

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import FORGIVEN, let_go, refusals, release_memory
from workers.models.loading import Loaded
from workers.replay.boundaries import tensors_of
from workers.stages.contract import Outcome, Report, unheard
from workers.stages.denoise import DenoiseStage
from workers.weights.forward_trace import Call, same, standing_in
from workers.weights.lockstep import LANE, Lockstep, is_plain

log = logging.getLogger(__name__)

# Of a result's norm, in other types than bf16 and in bf16, which rounds to 0.4 %, many times one after the other.
MOST_ROUNDING = (0.002, 0.01)


class BatchedDenoiseStage(DenoiseStage):
    """A denoise stage that takes along jobs which come next."""

    def __init__(
        self, loaded: Loaded, device: torch.device, checkpoint_seconds: float | None = None, cuda_graphs: bool = True
    ) -> None:
        super().__init__(loaded, device, checkpoint_seconds, cuda_graphs=cuda_graphs)
        self.ahead: Sequence[tuple[Recipe, tuple[Tensor, ...]]] = ()
        self._lockstep = Lockstep([], device)
        self._others: list[DenoiseStage] = []  # the same model in a pipeline for each job at once
        self._made: dict[tuple[Recipe, bytes], Outcome] = {}  # ahead, by what it was made of
        self._sound: dict[type, bool] = {}  # whether batches of a pipeline give what its jobs give alone

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return what DenoiseStage does; what is made for the jobs that were taken along is kept until they come."""
        ahead, self.ahead = self.ahead, ()
        if self._made and (made := self._made.pop((recipe, digest_of(tensors)), None)):
            return made
        cls = type(self.loaded.pipeline_for(recipe))
        streamed = any(residency.ring for residency in self.residencies)
        if not ahead or streamed or not self._sound.get(cls, True):
            return super().run(recipe, tensors, report)
        count = 1 + len(ahead)
        self._others += [DenoiseStage(self.loaded.another(), self.device) for _ in range(count - len(self._others))]
        first, *others = self._others[:count]
        first.checkpoint_seconds = self.checkpoint_seconds
        works = [functools.partial(first.denoise, recipe, tensors, report)]
        for stage, (other, its) in zip(others, ahead, strict=True):
            works.append(functools.partial(stage.denoise, other, its, unheard))
        with contextlib.ExitStack() as stack:
            if self.loaded.loras:
                stack.enter_context(self.loaded.loras.job(recipe.loras))
            for residency in self.residencies:
                stack.enter_context(residency.job(None))
            for name, denoiser in self.loaded.components.items():
                if denoiser in self.denoisers():
                    batches = Batches(self._lockstep, denoiser.forward, cls in self._sound)
                    stack.callback(self._note, cls, batches)
                    for stage in self._others[:count]:
                        stack.enter_context(standing_in(stage.loaded.components[name], batches))
            try:
                outcome, outcomes = self._lockstep.run(works, [])
            except Apart:
                outcome, outcomes = None, []
        if outcome is None:
            return super().run(recipe, tensors, report)
        made_ahead = zip(ahead, outcomes, strict=True)
        self._made = {(one, digest_of(its)): replace(o, alone=False) for (one, its), o in made_ahead if o}
        return replace(outcome, alone=False)

    def _note(self, cls: type, batches: "Batches") -> None:
        self._sound[cls] = self._sound.get(cls, True) and batches.sound


def digest_of(tensors: Sequence[Tensor]) -> bytes:
    """Return a digest of all that a task's tensors hold."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.data)
    return found.digest()


class Apart(Exception):
    """Not an error: jobs that were to be a batch don't go together."""


class Batches:
    """The forward of a denoiser for several jobs: each call waits until the others have come to theirs, or ended."""

    def __init__(self, lockstep: Lockstep, forward: Callable[..., Any], tried: bool) -> None:
        """`tried`: batches were seen to give what jobs give alone, so that it need not be looked at again."""
        functools.update_wrapper(self, forward)  # for pipelines that look at its parameters
        self._lockstep, self._forward, self._tried = lockstep, forward, tried
        self.sound = True  # batches may be made
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
        if len(calls) == 1:
            self._results[lane] = self._forward(*calls[0].args, **calls[0].kwargs)
        elif (together := put_together(calls)) is not None:
            self._results |= dict(zip(lanes, self._batch(together, calls), strict=True))
        else:
            raise Apart
        self._calls.clear()

    def _batch(self, together: Call, calls: Sequence[Call]) -> list[Any]:
        """Return the results of all calls in one; Apart where that can't be, and none is to be tried any more."""
        refused = refusals()
        try:
            result = self._forward(*together.args, **together.kwargs)
            shares = [share_of(result, number, len(calls)) for number in range(len(calls))]
            if self._tried:
                return shares
            alone = [self._forward(*call.args, **call.kwargs) for call in calls]
        except torch.OutOfMemoryError as error:
            log.warning("no memory for %d jobs at once, so they are denoised one by one: %s", len(calls), error)
            let_go(error)
        except Exception as error:  # whatever a denoiser makes of a batch
            log.warning("jobs are denoised one by one, for a batch fails: %s: %s", type(error).__name__, error)
            let_go(error)
        else:
            if all(map(near, shares, alone)):
                self._tried = True
                return alone
            log.warning("jobs are denoised one by one, for in a batch they come out otherwise than alone")
        release_memory()
        FORGIVEN.add(refused)
        self.sound = False
        raise Apart


def near(one: Any, other: Any) -> bool:
    """Return whether two results are the same but for rounding."""
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    most = MOST_ROUNDING[all(a.dtype == torch.bfloat16 for a, _ in pairs)]
    norms = [((a.float() - b.float()).norm(), b.float().norm()) for a, b in pairs if a.shape == b.shape]
    return len(norms) == len(pairs) and all(bool(away <= most * size) for away, size in norms)


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
    if not is_plain(first) and not isinstance(first, dict):
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


def length_of(batch: torch.Tensor | list[Any]) -> int:
    """Return the samples of a batch; 0 for a tensor that is a single number."""
    return 0 if isinstance(batch, torch.Tensor) and not batch.ndim else len(batch)


def share_of(result: Any, number: int, count: int) -> Any:
    """Return one job's part of a batch's result, of which there are so many."""
    match result:
        case torch.Tensor() | list() if length_of(result) and not length_of(result) % count:
            size = length_of(result) // count
            return result[number * size : (number + 1) * size]
        case tuple():
            return tuple(share_of(part, number, count) for part in result)
        case BaseOutput():
            return type(result)(**{name: share_of(part, number, count) for name, part in result.items()})
    return result

"""Checkpoints of a denoising loop between two steps: the latents and what its scheduler has come to. In any pipeline.

Another worker goes on from there by running the pipeline's own loop again, with the denoiser giving zeros up to that
step; then the saved state takes the place of what came of those. The generator draws as before, so noise matches, and
the picture has the same bits. What is stored are plain values and tensors, never an object.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict

from protocol.tensors import CHECKPOINT, Tensor
from workers.stages.contract import Report, Saved
from workers.tensors import from_wire, to_wire
from workers.weights.forward_trace import Call, Results

STATE = f"{CHECKPOINT}state"
COST_SHARE = 0.01  # of the time between two checkpoints that making one may take


class Unstorable(Exception):
    """A scheduler keeps something that is neither plain values nor tensors."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `step` steps; `scheduler` has those of its variables that have changed since the loop began."""

    step: int
    latents: torch.Tensor
    scheduler: Mapping[str, Any]
    results: Results  # of the denoiser, for its stand-in


def freeze(value: Any, tensors: list[torch.Tensor]) -> Any:
    """A value as msgpack knows it, with copies of its tensors put aside; Unstorable."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case torch.Tensor():
            return {"tensor": put_aside(value, tensors), "host": value.device.type == "cpu"}
        case np.ndarray() | np.generic():
            array = np.asarray(value)
            index = put_aside(torch.from_numpy(np.array(array)), tensors)
            return {"numpy": index, "scalar": isinstance(value, np.generic)}
        case list() | tuple():
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [freeze(item, tensors) for item in value]}
    raise Unstorable(type(value).__name__)


def check_storable(value: Any) -> None:
    match value:
        case None | bool() | int() | float() | str() | torch.Tensor() | np.ndarray() | np.generic():
            return
        case list() | tuple():
            for item in value:
                check_storable(item)
        case _:
            raise Unstorable(type(value).__name__)


def put_aside(tensor: torch.Tensor, tensors: list[torch.Tensor]) -> int:
    """Copy to the host, and return the copy's index; from a GPU it is there once the work queued so far is done."""
    on_gpu = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
    copy.copy_(tensor.detach(), non_blocking=on_gpu)
    tensors.append(copy)
    return len(tensors) - 1


def thaw(frozen: Any, tensors: Sequence[torch.Tensor], device: torch.device) -> Any:
    """The inverse of `freeze`."""
    match frozen:
        case {"tensor": int(index), "host": bool(host)}:
            return tensors[index].clone() if host else tensors[index].to(device)
        case {"numpy": int(index), "scalar": bool(scalar)}:
            array = tensors[index].numpy().copy()
            return array[()] if scalar else array
        case {"list": list(items)}:
            return [thaw(item, tensors, device) for item in items]
        case {"tuple": list(items)}:
            return tuple(thaw(item, tensors, device) for item in items)
        case None | bool() | int() | float() | str():
            return frozen
    raise ValueError("a checkpoint holds what none can hold")


@dataclass(slots=True)
class Draft:
    """A checkpoint whose copies may still be on their way from the device."""

    step: int
    state: dict[str, Any]
    tensors: list[torch.Tensor]
    arrived: torch.cuda.Event | None

    def finish(self) -> Saved:
        if self.arrived:
            self.arrived.synchronize()
        packed = msgpack.packb(self.state)
        state = Tensor(STATE, "uint8", (len(packed),), packed)
        rest = [to_wire(f"{CHECKPOINT}{i}", tensor) for i, tensor in enumerate(self.tensors)]
        return Saved(self.step, [state, *rest])


def read(tensors: Sequence[Tensor], device: torch.device) -> Checkpoint:
    """The checkpoint among received tensors, which must hold one; ValueError."""
    mine = [tensor for tensor in tensors if tensor.name.startswith(CHECKPOINT)]
    state = next(tensor for tensor in mine if tensor.name == STATE)
    values = [from_wire(tensor) for tensor in mine if tensor.name != STATE]
    match msgpack.unpackb(state.data):
        case {"step": int(step), "latents": latents, "scheduler": dict(scheduler), "results": list(results)}:
            return Checkpoint(
                step,
                thaw(latents, values, device),
                {name: thaw(value, values, device) for name, value in scheduler.items()},
                Results.from_plain(results),
            )
    raise ValueError("a checkpoint doesn't hold what it should")


def is_one(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.name == STATE for tensor in tensors)


class Recorder:
    """Takes checkpoints of one job at its step ends, as often as costs less than COST_SHARE of the time."""

    def __init__(self, scheduler: Any, device: torch.device, seconds: float) -> None:
        """`seconds` lie between two checkpoints at least; 0 is for one at every step."""
        self._scheduler, self._device, self._seconds = scheduler, device, seconds
        self._begun: dict[str, tuple[object, int]] | None = None  # the scheduler's variables as the loop began
        self._results: Results | None = None
        self._draft: Draft | None = None
        self._last = time.monotonic()
        self._cost = 0.0  # seconds, of the last one
        self._off = False

    def see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A forward hook of the denoiser."""
        if self._begun is None:
            self._begun = {name: (value, version_of(value)) for name, value in vars(self._scheduler).items()}
            if isinstance(result, tuple) and all(isinstance(part, torch.Tensor) for part in result):
                self._results = Results.of(Call(args, kwargs), result)

    def step_end(self, step: int, steps: int, latents: object) -> Saved | None:
        """The checkpoint that is ready now, if one is. `step` steps are done."""
        ready = self._deliver()
        now = time.monotonic()
        pause = self._seconds and max(self._seconds, self._cost / COST_SHARE)
        if self._begun is None or self._results is None or self._off or step == steps or now - self._last < pause:
            return ready
        self._draft = self._take(step, latents, self._results, self._begun)
        self._last, self._cost = now, time.monotonic() - now
        return ready if self._draft is None or self._draft.arrived else self._deliver()

    def _take(
        self, step: int, latents: object, results: Results, begun: Mapping[str, tuple[object, int]]
    ) -> Draft | None:
        tensors: list[torch.Tensor] = []
        values = {name: v for name, v in vars(self._scheduler).items() if not isinstance(v, FrozenDict)}
        changed = {name: v for name, v in values.items() if has_changed(v, begun.get(name))}
        try:
            if not isinstance(latents, torch.Tensor):
                raise Unstorable("no latents")
            for value in values.values():
                check_storable(value)  # what is none of these may change unseen
            state = {
                "step": step,
                "latents": freeze(latents, tensors),
                "scheduler": {name: freeze(value, tensors) for name, value in changed.items()},
                "results": results.plain(),
            }
        except Unstorable:
            self._off = True
            return None
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        return Draft(step, state, tensors, arrived)

    def _deliver(self) -> Saved | None:
        draft, self._draft = self._draft, None
        return draft.finish() if draft else None


def version_of(value: object) -> int:
    return value._version if isinstance(value, torch.Tensor) else 0


def has_changed(value: object, begun: tuple[object, int] | None) -> bool:
    """Return whether a value has changed since the loop began; lists and arrays may always have."""
    if begun is None or isinstance(value, list | np.ndarray):
        return True
    before, version = begun
    if isinstance(value, int | float | str):
        return type(value) is not type(before) or value != before
    return value is not before or version_of(value) != version


class ResumeForward:
    """A denoiser's forward that gives zeros until the loop has come to a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, forward: Callable[..., Any]) -> None:
        self.checkpoint, self._forward = checkpoint, forward
        self.over = False
        functools.update_wrapper(self, forward)  # for pipelines that look at its parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs) if self.over else self.checkpoint.results.zeros(Call(args, kwargs))

    def arrive(self, scheduler: Any, latents: torch.Tensor) -> None:
        """Put the saved state in the place of what came of zeros, now that the loop has done as many steps."""
        variables = vars(scheduler)
        for name in variables:
            if name in self.checkpoint.scheduler:
                variables[name] = self.checkpoint.scheduler[name]
        latents.copy_(self.checkpoint.latents)
        self.over = True


class Steps:
    """The step ends of a job: up to the step where it resumes, nothing; from there on reports, with checkpoints."""

    def __init__(
        self, report: Report, steps: int, recorder: Recorder | None = None, resume: ResumeForward | None = None
    ) -> None:
        self._report, self._steps, self._recorder, self._resume = report, steps, recorder, resume

    def begin(self) -> None:
        self._report(self._resume.checkpoint.step if self._resume else 0, self._steps)

    def end(self, pipeline: DiffusionPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline."""
        self._end(pipeline.scheduler, step + 1, values.get("latents"), getattr(pipeline, "_num_timesteps", 0))
        return values

    def _end(self, scheduler: Any, done: int, latents: object, steps: int) -> None:
        steps = steps or self._steps
        if self._resume and not self._resume.over:
            if done == self._resume.checkpoint.step:
                assert isinstance(latents, torch.Tensor)
                self._resume.arrive(scheduler, latents)
            return
        self._report(done, steps, self._recorder.step_end(done, steps, latents) if self._recorder else None)

    def ended(self, scheduler: Any) -> Callable[..., None]:
        """`callback` of pipelines that have only the older one."""
        return lambda step, timestep, latents: self._end(scheduler, step + 1, latents, 0)

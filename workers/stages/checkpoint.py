"""Checkpoints of denoising between two steps: what a loop carries along, and what its scheduler has come to.

Another worker goes on from there by running the pipeline's own call again, with the denoisers giving zeros up to that
step; then the saved state takes the place of what came of those, as it does at the end of each loop before it. The
generator draws as before, so noise matches, and the picture has the same bits. What is stored are plain values and
tensors, never an object.
"""

import functools
import inspect
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import msgpack
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from torch.utils._pytree import tree_map

from protocol.tensors import CHECKPOINT, Tensor
from workers.errors import StageError
from workers.replay.call_record import CallRecord
from workers.stages.contract import Report, Saved, watcher_of
from workers.stages.loop_state import LoopState, loop_state
from workers.tensors import from_wire, to_wire
from workers.weights.forward_trace import standing_in

STATE = f"{CHECKPOINT}state"
ENDED = "ended:"  # begins the names of a checkpoint's tensors that go to the next stages, of loops that are over
COST_SHARE = 0.01  # of the time between two checkpoints that making one may take


OF_PIPELINE = "self."  # begins the names of schedulers that are a pipeline's, beside those of its loop
OWN = f"{OF_PIPELINE}scheduler"
Variables = Mapping[str, tuple[object, int]]  # of an object: value and version of each, by name


class Unstorable(Exception):
    """A scheduler keeps something that is neither plain values nor tensors."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The values that the loop carries along after so many steps of the job, by the names of its variables."""

    step: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after `step` steps, of all loops that a call runs.

    The marks are the ends of loops that are over, and that step. Of schedulers, by the names of the pipeline's
    components or of the loop's variables that hold them, there are the variables that may have changed since the first
    loop began.
    """

    step: int
    marks: Sequence[Mark]
    schedulers: Mapping[str, Mapping[str, Any]]
    forwards: CallRecord  # with the shapes of the denoisers' results so far, for their stand-ins


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
    mine = {tensor.name: tensor for tensor in tensors if tensor.name.startswith(CHECKPOINT)}
    state = mine.pop(STATE)
    values = [from_wire(mine[f"{CHECKPOINT}{i}"]) for i in range(len(mine))]
    found = msgpack.unpackb(state.data)
    match found:
        case {"step": int(step), "marks": list(marks), "schedulers": dict(schedulers), "forwards": list(forwards)}:
            return Checkpoint(
                step,
                [Mark(count, thawed(kept, values, device)) for count, kept in marks],
                {name: thawed(kept, values, device) for name, kept in schedulers.items()},
                CallRecord(forwards=forwards),
            )
    raise ValueError("a checkpoint doesn't hold what it should")


def thawed(kept: Mapping[str, Any], values: Sequence[torch.Tensor], device: torch.device) -> dict[str, Any]:
    return {name: thaw(value, values, device) for name, value in kept.items()}


def is_one(tensors: Sequence[Tensor]) -> bool:
    return any(tensor.name == STATE for tensor in tensors)


def for_next_stages(saved: Saved | None) -> list[Tensor]:
    """Return a checkpoint under the names by which it goes along with a job's record."""
    return [replace(tensor, name=f"{ENDED}{tensor.name}") for tensor in saved.tensors] if saved else []


def ended_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the checkpoint that goes along with a job's record, of the loops that are over, if there is one."""
    return [tensor for tensor in tensors if tensor.name.startswith(ENDED)]


def newest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a job's last checkpoint: of a loop on its way, or else of those that are over; or none."""
    if is_one(tensors):
        return [tensor for tensor in tensors if tensor.name.startswith(CHECKPOINT)]
    return [replace(tensor, name=tensor.name.removeprefix(ENDED)) for tensor in ended_of(tensors)]


def schedulers_of(pipeline: DiffusionPipeline) -> dict[str, SchedulerMixin]:
    """Return a pipeline's schedulers, by their names in a checkpoint."""
    parts = pipeline.components.items()
    return {f"{OF_PIPELINE}{name}": part for name, part in parts if isinstance(part, SchedulerMixin)}


class Recorder:
    """Takes checkpoints of one job at its step ends, as often as costs less than COST_SHARE of the time."""

    def __init__(
        self,
        schedulers: Mapping[str, Any],
        device: torch.device,
        seconds: float,
        record: CallRecord,
        ends: Sequence[Mark] = (),
    ) -> None:
        """`schedulers` are those of `schedulers_of`; `seconds` lie between two checkpoints at least, 0: at every step.

        `record` is the job's; `ends` are those of loops that are over, where it resumes.
        """
        self._schedulers, self._device, self._seconds, self._record = schedulers, device, seconds, record
        self._begun: dict[str, Variables] | None = None  # of schedulers, as the first loop began
        self._ends = [*ends]  # of loops that are over
        self._draft: Draft | None = None
        self._last = time.monotonic()
        self._cost = 0.0  # seconds, of the last one
        self._off = False

    def see(self, module: torch.nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A forward hook of the denoisers."""
        if self._begun is None:
            self._begun = {
                name: {own: (value, version_of(value)) for own, value in vars(scheduler).items()}
                for name, scheduler in self._schedulers.items()
            }

    def step_end(self, step: int, left: int, loop: LoopState | None) -> Saved | None:
        """Return the checkpoint that is ready now, if one is. `step` steps of the job are done, `left` of the loop."""
        ready = self._deliver()
        if loop is None or self._begun is None or self._off or not self._record.can_stand_in:
            return ready
        if left == 0:
            self._ends.append(Mark(step, tree_map(clone, loop.values)))
            return ready
        now = time.monotonic()
        pause = self._seconds and max(self._seconds, self._cost / COST_SHARE)
        if now - self._last < pause:
            return ready
        self._draft = self._take([*self._ends, Mark(step, loop.values)], loop.schedulers, self._begun)
        self._last, self._cost = now, time.monotonic() - now
        return ready if self._draft is None or self._draft.arrived else self._deliver()

    def of_ended(self) -> Saved | None:
        """Return a checkpoint of the loops that are over; None where there is none, or nothing can hold it."""
        if not self._ends or self._begun is None or self._off or not self._record.can_stand_in:
            return None
        draft = self._take(self._ends, {}, self._begun)
        return draft.finish() if draft else None

    def _take(self, marks: Sequence[Mark], own: Mapping[str, Any], begun: Mapping[str, Variables]) -> Draft | None:
        """Copy the state at the last of some marks, where a loop has schedulers of its `own`."""
        tensors: list[torch.Tensor] = []
        every = {**self._schedulers, **own}
        schedulers = {name: changed(one, {} if name in own else begun[name]) for name, one in every.items()}
        try:
            if not any(isinstance(value, torch.Tensor) for value in marks[-1].values.values()):
                raise Unstorable("no latents")
            for one in every.values():
                for value in plain_variables(one).values():
                    check_storable(value)  # what is none of these may change unseen
            state = {
                "step": marks[-1].step,
                "marks": [[mark.step, {n: freeze(v, tensors) for n, v in mark.values.items()}] for mark in marks],
                "schedulers": {
                    name: {n: freeze(value, tensors) for n, value in kept.items()} for name, kept in schedulers.items()
                },
                "forwards": self._record.forwards,
            }
        except Unstorable:
            self._off = True
            return None
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        return Draft(marks[-1].step, state, tensors, arrived)

    def _deliver(self) -> Saved | None:
        draft, self._draft = self._draft, None
        return draft.finish() if draft else None


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def plain_variables(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scheduler).items() if not isinstance(value, FrozenDict)}


def changed(scheduler: Any, begun: Mapping[str, tuple[object, int]]) -> dict[str, Any]:
    return {n: v for n, v in plain_variables(scheduler).items() if has_changed(v, begun.get(n))}


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


class Resume:
    """The way back to a checkpoint: denoisers give zeros until the loops have come there."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, schedulers: Mapping[str, Any]) -> None:
        """`schedulers` are those of `schedulers_of`."""
        self.checkpoint, self.over, self._schedulers = checkpoint, False, schedulers
        self._device, self._forwards, self._marks = device, 0, list(checkpoint.marks)

    def standing_in(self, denoiser: torch.nn.Module) -> AbstractContextManager[None]:
        """Let zeros stand in for a denoiser's results on the way."""
        forward = denoiser.forward

        @functools.wraps(forward)  # for pipelines that look at its parameters
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self.over:
                return forward(*args, **kwargs)
            self._forwards += 1
            return self.checkpoint.forwards.forward(self._forwards - 1, self._device)

        return standing_in(denoiser, stand_in)

    def step_end(self, step: int, loop: LoopState) -> None:
        """Put saved values in the place of what came of zeros, where a loop ended or the checkpoint was taken."""
        if not self._marks or self._marks[0].step != step:
            return
        for name, value in self._marks.pop(0).values.items():
            put_back(loop.values.get(name), value)
        if not self._marks:
            for name, kept in self.checkpoint.schedulers.items():
                every = {**self._schedulers, **loop.schedulers}
                if (known := name or OWN) not in every:  # an earlier release named the pipeline's own one ""
                    raise StageError("a checkpoint is of another loop")
                variables = vars(every[known])
                variables |= {n: value for n, value in kept.items() if n in variables}
            self.over = True


def put_back(now: Any, saved: Any) -> None:
    """Write saved tensors over those that a loop has now; StageError where it has others. The rest comes by itself."""
    match now, saved:
        case torch.Tensor(), torch.Tensor() if (now.shape, now.dtype) == (saved.shape, saved.dtype):
            now.copy_(saved)
        case ((list() | tuple()), (list() | tuple())) if len(now) == len(saved):
            for one, other in zip(now, saved, strict=True):
                put_back(one, other)
        case _, (torch.Tensor() | list() | tuple()):
            raise StageError("a checkpoint is of another loop")


class Steps:
    """The step ends of a job, over all its loops: up to the step where it resumes, nothing; from there on reports."""

    def __init__(
        self, report: Report, steps: int, recorder: Recorder | None = None, resume: Resume | None = None
    ) -> None:
        self._report, self._steps, self._recorder, self._resume = report, steps, recorder, resume
        self._watcher = watcher_of(report)
        self._done = 0

    def of_ended(self) -> Saved | None:
        """Return a checkpoint of the loops that are over; None where none is made."""
        return self._recorder.of_ended() if self._recorder else None

    def begin(self) -> None:
        self._report(self._resume.checkpoint.step if self._resume else 0, self._steps)

    def end(self, pipeline: DiffusionPipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline: it changes nothing, and so gives nothing back."""
        self._end(step, getattr(pipeline, "_num_timesteps", 0), inspect.currentframe())
        if self._watcher:
            self._watcher.see(pipeline, step, values.get("latents"))
        return {}

    def _end(self, step: int, of_loop: int, frame: FrameType | None) -> None:
        caller = frame.f_back if frame else None
        loop = loop_state(caller) if caller and (self._recorder or self._resume) else None
        of_loop = of_loop or self._steps
        self._done += 1
        if self._resume and not self._resume.over:
            if loop is None:
                raise StageError("a checkpoint is of another loop")
            self._resume.step_end(self._done, loop)
            return
        saved = self._recorder.step_end(self._done, of_loop - step - 1, loop) if self._recorder else None
        self._report(self._done, max(self._done - step - 1 + of_loop, self._done), saved)

    def ended(self, step: int, timestep: Any, latents: Any) -> None:
        """`callback` of pipelines that have only the older one."""
        self._end(step, 0, inspect.currentframe())

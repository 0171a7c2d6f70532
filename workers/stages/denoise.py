"""The denoise stage: the pipeline's own call up to the moment when it would decode."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.nn import Module

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.errors import StageError, let_go
from workers.models.description import call_parameters
from workers.models.loading import Loaded
from workers.models.source import stages_of
from workers.models.speedups import allow_all_sizes
from workers.replay.boundaries import Stopped, tensors_of
from workers.replay.call_record import CallRecord
from workers.stages.checkpoint import (
    Checkpoint,
    Recorder,
    Resume,
    Steps,
    for_next_stages,
    is_one,
    newest,
    read,
    schedulers_of,
)
from workers.stages.contract import Outcome, Report, unheard, watcher_of
from workers.stages.pipeline_call import arguments_of, new_run, pictures_of, until_stop
from workers.weights.cuda_graphs import JobKind
from workers.weights.forward_trace import Call, Results, standing_in
from workers.weights.residency import caches_steps

LEAST_STEPS = 4  # of a job, for a CUDA graph to be worth recording


class DenoiseStage:
    def __init__(
        self,
        loaded: Loaded,
        device: torch.device,
        checkpoint_seconds: float | None = None,
        forwards: "type[PipelineForwards] | None" = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Checkpoints are at least so many seconds apart; 0: one at every step; None: none are made.

        CUDA graphs are recorded where GPUs wait for their host.
        """
        self.loaded, self.pipeline, self.device = loaded, loaded.pipeline, device
        self.residencies = tuple(loaded.residencies.values())
        self.checkpoint_seconds, self._forwards = checkpoint_seconds, forwards or PipelineForwards
        self.split, self.cuda_graphs = loaded.split, cuda_graphs

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Return the record of the stages so far as shapes, with what the pipeline would have decoded.

        With a checkpoint among the tensors it goes on from there.
        """
        with self.weights(recipe, tensors):
            return self.denoise(recipe, tensors, report)

    def denoise(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """Do what `run` does, with the weights on the device."""
        last = newest(tensors)
        saved = read(last, self.device) if last else None
        record = record_of(tensors)
        run = new_run("denoise", record, self.device, recipe)
        if recipe.ip_scale is not None:
            self.loaded.pipeline_for(recipe).set_ip_adapter_scale(recipe.ip_scale)
        try:
            with self.course(recipe, record, report, saved, in_loop=is_one(tensors)) as steps:
                steps.begin()
                result = until_stop(self.loaded.pipeline_for(recipe), run, self.arguments(recipe, tensors, steps))
                goes_on = bool(run.pending) and isinstance(result, Stopped)
                ended = for_next_stages(steps.of_ended()) if isinstance(result, Stopped | None) else []
        finally:
            reset_caches(self.pipeline)
        if run.pending:
            check_finite(run.pending)
            watcher = watcher_of(report)
            seen = watcher.left() if watcher and not goes_on else []
            left, calls = [*run.for_decoding(goes_on, unsure=result is None).pack(), *ended, *seen], len(record.calls)
            return Outcome(left, next="vae", wants=run.pending[0][0], calls=calls)
        if isinstance(result, Stopped):
            left = [*record.pack(), *ended]
            return Outcome(left, next=result.owner, wants=result.label, calls=len(record.calls))
        return Outcome(pictures_of(result, self.pipeline))  # it works on pixels

    @contextlib.contextmanager
    def weights(self, recipe: Recipe, tensors: tuple[Tensor, ...]) -> Iterator[None]:
        """Surround a job: the weights that it needs are on the device when they are needed, its LoRAs' among them."""
        record, begins = record_of(tensors), not newest(tensors)
        if any(residency.compiled for residency in self.residencies):
            allow_all_sizes()  # torch's settings hold in the thread that makes them, which may be another job's
        with contextlib.ExitStack() as stack:
            if self.loaded.loras:
                stack.enter_context(self.loaded.loras.job(recipe.loras))
            if self.split:
                (twin,) = self.denoisers()
                forwards = self._forwards(self, twin, recipe, tensors, record, begins)
                stack.enter_context(self.split.job(twin, forwards, shape_of(recipe), self.kind_of_job(recipe)))
            elif len(self.residencies) == 1:
                (residency,) = self.residencies
                forwards = self._forwards(self, residency.module, recipe, tensors, record, begins)
                stack.enter_context(residency.job(forwards, in_steps=not is_rank(), kind=self.kind_of_job(recipe)))
            else:
                kind = self.kind_of_job(recipe)
                for residency in self.residencies:
                    stack.enter_context(residency.job(None, in_steps=not is_rank(), kind=kind))
            yield

    def kind_of_job(self, recipe: Recipe) -> JobKind | None:
        """Return what jobs have in common that may use one another's CUDA graphs; None for one that may use none."""
        cached = any(map(caches_steps, self.denoisers()))
        if not self.cuda_graphs or recipe.steps < LEAST_STEPS or is_rank() or cached:
            return None
        size = (
            type(self.loaded.pipeline_for(recipe)), recipe.width, recipe.height, recipe.frames, recipe.num_images,
            (recipe.cfg_scale or 0) > 1, recipe.max_sequence_length, tuple(recipe.named_pictures),
        )  # fmt: skip
        return JobKind(size, (recipe.guidance, recipe.cfg_scale, recipe.loras, recipe.ip_scale, recipe.settings))

    @contextlib.contextmanager
    def course(
        self, recipe: Recipe, record: CallRecord, report: Report, saved: Checkpoint | None, in_loop: bool
    ) -> Iterator[Steps]:
        """The job's steps: recorded as they go, and from a checkpoint on if there is one.

        That is in the middle of a loop, or else its last mark is the end of one, too.
        """
        denoisers = self.denoisers()
        if any(getattr(one, "is_cache_enabled", False) for one in denoisers):  # a step cache has a memory of its own
            yield Steps(report, recipe.steps)
            return
        recorder, ends = None, (saved.marks[:-1] if in_loop else saved.marks) if saved else ()
        schedulers = schedulers_of(self.pipeline)
        with contextlib.ExitStack() as stack:
            if self.checkpoint_seconds is not None:
                recorder = Recorder(schedulers, self.device, self.checkpoint_seconds, record, ends)
                for denoiser in denoisers:
                    stack.callback(denoiser.register_forward_hook(recorder.see).remove)
            resume = Resume(saved, self.device, schedulers) if saved else None
            if resume:
                for denoiser in denoisers:
                    stack.enter_context(resume.standing_in(denoiser))
            yield Steps(report, recipe.steps, recorder, resume)

    def denoisers(self) -> list[torch.nn.Module]:
        """The models that run in each step; most pipelines have one."""
        components = self.loaded.components.items()
        return [part for name, part in components if stages_of(name) == ("denoise",) and isinstance(part, Module)]

    def arguments(self, recipe: Recipe, tensors: tuple[Tensor, ...], steps: Steps) -> dict[str, Any]:
        pipeline = self.loaded.pipeline_for(recipe)
        parameters, arguments = call_parameters(pipeline), arguments_of(pipeline, recipe, tensors)
        if "callback_on_step_end" in parameters:
            arguments["callback_on_step_end"] = steps.end
        elif "callback" in parameters:
            arguments["callback"] = steps.ended
        return arguments


def record_of(tensors: tuple[Tensor, ...]) -> CallRecord:
    """Return the record of the stages so far; forwards of an earlier visit are made, or stood in for, once more."""
    record = CallRecord.unpack(tensors)
    record.forwards = []
    return record


def is_rank() -> bool:
    """Return whether this process computes together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_finite(pending: Sequence[tuple[str, Any]]) -> None:
    """Raise StageError where not all numbers that are to be decoded are finite."""
    for value in tensors_of([arguments for _, arguments in pending]):
        if not torch.isfinite(value).all():
            raise StageError(f"the latents hold NaN or infinity ({value.dtype}); another --dtype may help")


class TwoForwardsDone(Exception):
    """Not an error: the forwards that were wanted are done."""


@dataclass(frozen=True, slots=True)
class PipelineForwards:
    """The forwards of a job before it makes them, found by its own loop."""

    stage: DenoiseStage
    denoiser: torch.nn.Module
    recipe: Recipe
    tensors: tuple[Tensor, ...]
    record: CallRecord
    begins: bool  # at the first step

    @property
    def whole(self) -> bool:
        """Return whether it can be watched from its first step on, and has a second."""
        return self.begins and self.recipe.steps > 1

    def foresee(self, results: Results) -> list[Call]:
        """All forwards of the job, by its loop run dry: the denoiser gives zeros, so only the latents are wrong."""
        calls: list[Call] = []

        def record(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            calls.append(Call(args, kwargs))
            return results.zeros(calls[-1])

        with standing_in(self.denoiser, record):
            self._run()
        return calls

    def rehearse(self) -> None:
        """Run the job's first two forwards, and no more."""
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            if done == 2:
                raise TwoForwardsDone

        hook = self.denoiser.register_forward_hook(count)
        try:
            self._run()
        except TwoForwardsDone as reached:
            let_go(reached)
            reset_caches(self.stage.pipeline)
        finally:
            hook.remove()

    def _run(self) -> None:
        record = CallRecord(self.record.calls, tensors=self.record.tensors)
        run = new_run("denoise", record, self.stage.device, self.recipe)
        arguments = self.stage.arguments(self.recipe, self.tensors, Steps(unheard, self.recipe.steps))
        until_stop(self.stage.loaded.pipeline_for(self.recipe), run, arguments)


def shape_of(recipe: Recipe) -> tuple[object, ...]:
    """Return the key of a job's shapes: equal keys mean tensors of the same shapes, and others may mean so, too."""
    return (
        recipe.width, recipe.height, recipe.sized, recipe.frames, recipe.num_images, recipe.cfg_scale,
        recipe.max_sequence_length, tuple(recipe.named_pictures.items()), recipe.negative_prompt, recipe.settings,
    )  # fmt: skip


def reset_caches(pipeline: DiffusionPipeline) -> None:
    """Empty the denoiser's step caches: a loop that was left, at its decoding or before, leaves them full."""
    for component in pipeline.components.values():
        if getattr(component, "is_cache_enabled", False):
            component._reset_stateful_cache()

"""Embeddings → latents, by the pipeline's own `__call__`, stopped at the moment when it would decode."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from protocol.jobs import Recipe
from protocol.tensors import Tensor
from workers.describe import call_parameters, guidance_arguments
from workers.loading import Loaded
from workers.modulation import Call, Results, standing_in
from workers.outcome import Outcome, Report, StageError
from workers.skeleton import Decoding
from workers.torch_tensors import Value, pack, unpack


class DenoiseStage:
    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.pipeline, self.device = loaded.pipeline, device
        self.residencies = tuple(loaded.residencies.values())

    def run(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> Outcome:
        """What the pipeline would have decoded: `decode:0` is the latents, as `vae.decode` wants them."""
        try:
            with contextlib.ExitStack() as stack:
                for residency in self.residencies:
                    play = Play(self, residency.module, recipe, tensors)
                    stack.enter_context(residency.job(play if len(self.residencies) == 1 else None))
                decoding = self.until_decoding(self.arguments(recipe, tensors, report))
        finally:
            reset_caches(self.pipeline)
        return Outcome(pack(self.travelling(decoding)))

    def until_decoding(self, arguments: dict[str, Any]) -> Decoding:
        try:
            self.pipeline(**arguments)
        except Decoding as decoding:
            return decoding
        raise StageError(f"{type(self.pipeline).__name__} came to its end without decoding anything")

    def arguments(self, recipe: Recipe, tensors: tuple[Tensor, ...], report: Report) -> dict[str, Any]:
        parameters = call_parameters(self.pipeline)
        true_cfg, distilled = guidance_arguments(self.pipeline)
        arguments: dict[str, Any] = {
            **unpack(tensors, self.device),
            "height": recipe.height,
            "width": recipe.width,
            "num_inference_steps": recipe.steps,
            "generator": torch.Generator("cpu").manual_seed(recipe.seed),
        }
        if true_cfg and recipe.cfg_scale is not None:
            arguments[true_cfg] = recipe.cfg_scale
        if distilled and recipe.guidance is not None:
            arguments[distilled] = recipe.guidance
        if recipe.max_sequence_length is not None:
            arguments["max_sequence_length"] = recipe.max_sequence_length
        # Embeddings stand in for the prompts, which some pipelines' defaults would put beside them.
        arguments |= {name: None for name in ("prompt", "negative_prompt") if name in parameters}
        if "use_resolution_binning" in parameters:
            arguments["use_resolution_binning"] = False  # it would resize after decoding; the size asked for is made
        report(0, recipe.steps)
        if "callback_on_step_end" in parameters:
            arguments["callback_on_step_end"] = self.step_end(recipe, report)
        elif "callback" in parameters:
            arguments["callback"] = lambda step, *_: report(step + 1, recipe.steps)
        return arguments

    def step_end(self, recipe: Recipe, report: Report) -> Any:
        def on_step_end(
            pipeline: DiffusionPipeline, step: int, timestep: Any, values: dict[str, Any]
        ) -> dict[str, Any]:
            report(step + 1, max(recipe.steps, getattr(pipeline, "_num_timesteps", recipe.steps)))
            return values

        return on_step_end

    def travelling(self, decoding: Decoding) -> dict[str, Value]:
        """The tensors among decode's arguments; a generator or a flag has no part in decoding."""
        named = {str(i): value for i, value in enumerate(decoding.arguments)} | decoding.keywords
        found: dict[str, Value] = {f"decode:{n}": v for n, v in named.items() if isinstance(v, torch.Tensor)}
        for value in found.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise StageError(f"the latents hold NaN or infinity ({value.dtype}); another --dtype may help")
        return found


class Rehearsed(Exception):
    """Not an error: the forwards that were wanted are done."""


@dataclass(frozen=True, slots=True)
class Play:
    """A job told before it goes, by its own loop."""

    stage: DenoiseStage
    denoiser: torch.nn.Module
    recipe: Recipe
    tensors: tuple[Tensor, ...]

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
        """The job's first two forwards, and no more."""
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            if done == 2:
                raise Rehearsed

        hook = self.denoiser.register_forward_hook(count)
        try:
            self._run()
        except Rehearsed:
            reset_caches(self.stage.pipeline)
        finally:
            hook.remove()

    def _run(self) -> None:
        self.stage.until_decoding(self.stage.arguments(self.recipe, self.tensors, lambda step, steps: None))


def reset_caches(pipeline: DiffusionPipeline) -> None:
    """A loop that was left, at its decoding or before, leaves the denoiser's step caches full."""
    for component in pipeline.components.values():
        reset = getattr(component, "_reset_stateful_cache", None)
        if reset is not None:
            reset()

"""The three stages in this process, in whatever order they name."""

from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.dispatch.transitions import MAX_VISITS
from protocol.job import Recipe
from protocol.pictures import pictures_among
from protocol.stages import FIRST, STAGES, Stage
from protocol.tensors import Tensor
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source
from workers.stages.contract import Saved, unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage

CPU = torch.device("cpu")


def stages(
    source: Source, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tuple[TextStage, DenoiseStage, VaeStage]:
    devices = Devices(device)
    text, denoise, vae = (load(source, stage, devices, dtype) for stage in ("text", "denoise", "vae"))
    return TextStage(text, device), DenoiseStage(denoise, device), VaeStage(vae, device)


def through(source: Source, recipe: Recipe, given: Sequence[Tensor] = (), *how: Any, **more: Any) -> torch.Tensor:
    """Go through the stages in whatever order they name, as `go_through` does; return all pictures or frames."""
    pictures = pictures_among(all_through(source, recipe, given, *how, **more))
    return torch.frombuffer(bytearray(pictures.data), dtype=torch.uint8).reshape(pictures.shape)


def all_through(source: Source, recipe: Recipe, given: Sequence[Tensor] = (), *how: Any, **more: Any) -> list[Tensor]:
    """Return what the last stage gives; the rest as `go_through` takes it."""
    return go_through(source, recipe, given, *how, **more)[0]


def go_through(
    source: Source,
    recipe: Recipe,
    given: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    killed_at: int | None = None,
    checkpoint_seconds: float | None = None,
) -> tuple[list[Tensor], list[Stage]]:
    """Return what the last stage gives, and the way there.

    A denoiser that dies once so many steps are told is followed by another one, from its last checkpoint.
    """
    by_name: dict[Stage, Any] = dict(zip(STAGES, stages(source, dtype, device), strict=True))
    by_name["denoise"].checkpoint_seconds = 0.0 if killed_at is not None else checkpoint_seconds
    kept: list[Saved] = []
    left: tuple[Tensor, ...] = ()
    way: list[Stage] = [FIRST]

    def report(step: int, steps: int, saved: Saved | None = None) -> None:
        nonlocal killed_at
        kept.extend([saved] if saved else [])
        if way[-1] == "denoise" and step == killed_at:
            killed_at = None
            raise ConnectionAbortedError

    while len(way) < MAX_VISITS:
        kept.clear()
        task = (*left, *given)
        try:
            outcome = by_name[way[-1]].run(recipe, task, report)
        except ConnectionAbortedError:
            by_name["denoise"] = DenoiseStage(load(source, "denoise", Devices(device), dtype), device, 0.0)
            outcome = by_name["denoise"].run(recipe, (*task, *(kept[-1].tensors if kept else ())), unheard)
        left = tuple(outcome.tensors)
        if not outcome.next:
            return list(left), way
        way.append(outcome.next)
    raise AssertionError(f"it goes in circles, now to {outcome.next} for {outcome.wants}")

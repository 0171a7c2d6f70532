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
from workers.stages.contract import unheard
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


def through(
    source: Source,
    recipe: Recipe,
    given: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> torch.Tensor:
    """Go through the stages in whatever order they name; return all pictures or frames."""
    pictures = pictures_among(all_through(source, recipe, given, dtype, device))
    return torch.frombuffer(bytearray(pictures.data), dtype=torch.uint8).reshape(pictures.shape)


def all_through(
    source: Source,
    recipe: Recipe,
    given: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> list[Tensor]:
    by_name: dict[Stage, Any] = dict(zip(STAGES, stages(source, dtype, device), strict=True))
    outcome = by_name[FIRST].run(recipe, tuple(given), unheard)
    for _ in range(MAX_VISITS):
        if not outcome.next:
            break
        outcome = by_name[outcome.next].run(recipe, (*outcome.tensors, *given), unheard)
    assert outcome.next is None, f"it goes in circles, now to {outcome.next} for {outcome.wants}"
    return list(outcome.tensors)

"""Reading what stages leave, for tests."""

from collections.abc import Sequence

import torch

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source
from workers.replay.boundaries import tensors_of
from workers.replay.call_record import CallRecord
from workers.stages.contract import unheard
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage


def latents_of(tensors: Sequence[Tensor]) -> torch.Tensor:
    """The latents that a denoise stage wants decoded."""
    record = CallRecord.unpack(tensors)
    (latents, *_), _, _ = record.value(record.decodes[0], torch.device("cpu"))
    found: torch.Tensor = latents
    return found


def embeddings_of(tensors: Sequence[Tensor]) -> torch.Tensor:
    """The first of the embeddings that a text stage leaves."""
    record = CallRecord.unpack(tensors)
    found: torch.Tensor = record.value(record.calls[0], torch.device("cpu"))[0]
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def before_denoising(source: Source, recipe: Recipe, given: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Run the stages before the denoiser; return its input, with the pictures that the job begins from."""
    cpu = torch.device("cpu")
    text = TextStage(load(source, "text", Devices(cpu), torch.float32), cpu)
    outcome = text.run(recipe, tuple(given), unheard)
    if outcome.next == "vae":
        vae = VaeStage(load(source, "vae", Devices(cpu), torch.float32), cpu)
        outcome = vae.run(recipe, (*outcome.tensors, *given), unheard)
    assert outcome.next == "denoise"
    return (*outcome.tensors, *given)


def decodes_of(tensors: Sequence[Tensor]) -> bytes:
    """The bits of all that the vae stage is to decode."""
    record = CallRecord.unpack(tensors)
    return b"".join(
        bits(tensor) for tensor in tensors_of([record.value(call, torch.device("cpu")) for call in record.decodes])
    )

"""Running out of memory is an outcome with a reason, and a VAE helps itself."""

from pathlib import Path
from typing import Any

import torch

from protocol.job import JobRequest
from protocol.recipe import resolve
from workers.errors import cause_of
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import read
from workers.replay.call_record import CallRecord
from workers.stages.vae import IN_TILES, VaeStage
from workers.tensors import from_wire

CPU = torch.device("cpu")


def test_a_vae_without_room_decodes_in_tiles_and_says_so(flux_dev: Path) -> None:
    source = read("x", flux_dev, None)
    stage = VaeStage(load(source, "vae", Devices(CPU), torch.float32), CPU)
    recipe = resolve(JobRequest(prompt="a", width=32, height=32, seed=1), describe(source), "float32", None)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    record = CallRecord()
    record.add("encode_prompt", (torch.zeros(1, 512, 32), torch.zeros(1, 32), torch.zeros(512, 3)), CPU)
    record.add_decode("vae.decode", ((latents,), {"return_dict": False}, None), CPU)
    tensors = tuple(record.pack())
    whole = stage.run(recipe, tensors, lambda *_: None)
    assert whole.warnings == ()

    tries = 0

    def cramped(*_: Any) -> None:
        nonlocal tries
        if not stage.vae.use_tiling:
            tries += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    stage.vae.decoder.register_forward_pre_hook(cramped)
    tiled = stage.run(recipe, tensors, lambda *_: None)
    assert tiled.warnings == (IN_TILES,)
    assert not stage.vae.use_tiling
    assert from_wire(tiled.tensors[0]).shape == from_wire(whole.tensors[0]).shape
    again = [stage.run(recipe, tensors, lambda *_: None) for _ in range(3)]
    assert tries == 2  # then it is known
    assert all(torch.equal(from_wire(other.tensors[0]), from_wire(tiled.tensors[0])) for other in again)


def test_the_reason_says_what_would_help() -> None:
    reason = cause_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    assert reason.startswith("OutOfMemoryError: CUDA out of memory.")
    assert "--max-memory" in reason

"""Ranks: what they tell each other, and one alone, whose weights are swapped."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from protocol.messages.worker import Ready
from tests import tiny
from tests.tiny import needs_gpus
from workers.runtime.ranks import DONE, GO, STOP, take_part, tell, told_ready


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


def failing(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_rank_that_fails_alone_ends_and_one_that_fails_with_the_first_goes_on(
    link: tuple[socket.socket, socket.socket],
) -> None:
    near, far = link
    stage = SimpleNamespace(run=failing, device=torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        take_part(stage, None, (), far, fail_seconds=0.05)
    near.sendall(GO + GO + STOP)
    take_part(stage, None, (), far)
    assert near.recv(1) == DONE


def test_what_ranks_tell_comes_whole(link: tuple[socket.socket, socket.socket]) -> None:
    near, far = link
    tell(near, Ready(context_bytes=(7,)))
    assert told_ready(far).context_bytes == (7,)


ONE_RANK = """
import sys
from pathlib import Path
import torch
from protocol.gpu_memory import Lease
from protocol.job import JobRequest
from protocol.recipe import resolve
from tests.records import latents_of
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import read
from workers.models.speedups import StageSpeedups
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.weights.gpu_lease import GpuLease, apply_leases

device = torch.device(sys.argv[2])
backend = "nccl" if device.type == "cuda" else "gloo"
torch.distributed.init_process_group(backend, init_method=f"file://{sys.argv[3]}", rank=0, world_size=1)
source = read("x", Path(sys.argv[1]), None)
recipe = resolve(JobRequest(prompt="a", width=32, height=32, steps=3, seed=1), describe(source), "float32", None)
text = TextStage(load(source, "text", Devices(device), torch.float32), device)
embeddings = tuple(text.run(recipe, (), lambda *_: None).tensors)

def latents(stage):
    return latents_of(stage.run(recipe, embeddings, lambda *_: None).tensors)

wanted = latents(DenoiseStage(load(source, "denoise", Devices(device), torch.float32), device))
loaded = load(source, "denoise", Devices(device, leased=True), torch.float32, StageSpeedups(parallel="tensor-1"))
stage = DenoiseStage(loaded, device)
(residency,) = stage.residencies
gpu_lease = GpuLease(device, (residency,), 1)
assert residency.least_bytes < residency.total_bytes / 2  # parts of weights are streamed as whole ones are
for compiled in (False, True):
    if compiled:
        residency.compile("aot_eager")
    found = []
    for part in (1.0, 0.0, 0.7, 1.0):
        size = int(residency.total_bytes * part)
        leased = apply_leases([gpu_lease], [Lease(bytes=size + (1 << 30 if size else 0), weight_bytes=size)])
        assert not leased.reason, leased.reason
        assert residency.state == {1.0: "in", 0.0: "out", 0.7: "streamed"}[part]
        if size:
            found += [latents(stage), latents(stage)]
    assert torch.allclose(found[0], wanted, atol=1e-4), (found[0] - wanted).abs().max()
    assert all(torch.equal(one, found[0]) for one in found)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpus(1))])
def test_a_ranks_weights_come_and_go_compiled_or_not(device: str, tmp_path: Path) -> None:
    model = tiny.save(tiny.flux(depth=4), tmp_path / "flux")
    command = [sys.executable, "-c", ONE_RANK, str(model), device, str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]

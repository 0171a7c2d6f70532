"""Decisions beside many GPUs: about some of them at a time, and all jobs are done nonetheless."""

from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

import pytest

from orchestrator.dispatch import leasing
from orchestrator.memory.margins import FIRST_HEADROOM
from orchestrator.scheduling.snapshot import IdleWorker
from protocol.gpu_memory import WeightNeed
from protocol.stages import Stage
from tests.memory_world import Sim, World

MB = 10**6
EACH = 4  # GPUs of a host


def workers(gpus: int) -> list[Sim]:
    """A denoiser on each GPU, text encoders and a VAE on each host's first and last, which can't all be in at once."""
    found = []
    for gpu in range(gpus):
        need = WeightNeed(weights=9000 * MB, least=3000 * MB, workspace=1600 * MB)
        found.append(Sim("denoise", need, 1300 * MB, 0, gpu=gpu))
        if gpu % EACH == 0:
            need = WeightNeed(weights=7000 * MB, least=700 * MB, workspace=600 * MB)
            found.append(Sim("text", need, 475 * MB, 0, gpu=gpu))
        if gpu % EACH == EACH - 1:
            need = WeightNeed(weights=250 * MB, least=250 * MB, workspace=2500 * MB)
            found.append(Sim("vae", need, 2200 * MB, 0, gpu=gpu))
    return found


@pytest.mark.parametrize("few", [2, 1000])
def test_all_jobs_are_done_whatever_part_of_the_gpus_a_decision_is_about(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leasing, "FEW_GPUS", few)
    monkeypatch.setattr(leasing, "IN_TURNS", 1)
    gpus = 12
    world = World(11_000 * MB + 3 * FIRST_HEADROOM, workers(gpus), tmp_path, gpus=gpus)
    looked = Counter[bool]()
    real = world.engine.leasing._worth_looking_at

    def look(idle: list[IdleWorker], drained: Container[Stage]) -> tuple[Sequence[IdleWorker], bool]:
        found = real(idle, drained)
        looked[found[1]] += 1
        return found

    monkeypatch.setattr(world.engine.leasing, "_worth_looking_at", look)
    jobs = world.run(world.submit(60), 400)
    assert [job.state for job in jobs] == ["done"] * 60
    assert (looked[False] > looked[True]) == (few == 2)
    denoisers = {record.worker for job in jobs for record in job.records if record.stage == "denoise"}
    assert len(denoisers) >= gpus // 2  # those that share their GPU with nobody

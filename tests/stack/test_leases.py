"""A whole stack whose stages share one GPU that can't hold them all: a CPU stands in for it, with all else real."""

from pathlib import Path

import pytest
import torch

from protocol.job import JobRequest
from protocol.messages.client import Workers
from tests import tiny
from tests.stack.test_stack import until
from tests.stacks import running_stack, triptych
from tests.tiny import plain

SIZE = {"width": 32, "height": 32, "steps": 3}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=8), tmp_path_factory.mktemp("deep"))


def weights(workers: Workers, stage: str) -> int:
    worker = next(worker for worker in workers.workers if worker.stage == stage)
    return sum(component.total_bytes for component in worker.residency)


@pytest.mark.parametrize("share", [0.6, pytest.param(0.9, marks=pytest.mark.all)])
def test_pictures_are_equal_under_any_budget_and_no_budget_is_passed(deep: Path, tmp_path: Path, share: float) -> None:
    prompts = [f"a red circle {i}" for i in range(3)]
    wanted = [
        plain(deep, prompt=prompt, seed=i, width=32, height=32, num_inference_steps=3)
        for i, prompt in enumerate(prompts)
    ]
    arguments = ("--model", str(deep), "--device", "cpu:0")
    budget = 1 << 30
    for whole in (True, False):
        state = tmp_path / str(whole)
        with running_stack(state, *arguments, "--budget", f"0={budget}B") as stack:
            held = until(stack, lambda w: all(worker.residency for worker in w.workers))
            total = weights(held, "denoise")
            jobs = stack.client.submit_many(
                [JobRequest(prompt=prompt, seed=i, **SIZE) for i, prompt in enumerate(prompts)]
            )
            for job, picture in zip(jobs, wanted, strict=True):
                while stack.client.job(job.id).finished is None:
                    leases = [sum(worker.lease_bytes) for worker in stack.client.workers().workers]
                    assert sum(leases) <= budget
                assert torch.equal(stack.pictures(job.id), picture)
            workers = {worker.stage: worker for worker in stack.client.workers().workers}
            assert workers["denoise"].residency[0].state in (("in",) if whole else ("streamed", "out"))
            shown = triptych("workers", folder=state).stdout
            assert "of GPU 0" in shown
        lent = "were lent" in (state / "logs" / "denoise-1.log").read_text()
        assert lent == (not whole)  # to text encoders and VAE, which else are all in
        budget = int(total * share)


def test_settings_that_cannot_work_are_refused_before_anything_starts(state: Path) -> None:
    for arguments, words in (
        (("--device", "cpu:0"), "no budget"),
        (("--budget", "7=16GB"), "There is no GPU 7"),
        (("--budget", "x=16GB"), "--budget"),
        (("--device", "cpu:0", "--budget", "0=much"), "much"),
    ):
        refused = triptych("up", *arguments, folder=state)
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr

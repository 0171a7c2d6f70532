"""A whole stack that denoises in batches."""

from pathlib import Path

import torch

from protocol.job import JobRequest
from tests.stacks import running_stack, triptych

PROMPTS = [f"a {color} circle" for color in ("red", "blue", "green", "yellow", "white")]


def test_jobs_in_batches_make_the_pictures_of_jobs_alone_but_for_rounding(state: Path, tmp_path: Path) -> None:
    requests = [JobRequest(prompt=p, seed=n, width=64, height=64, steps=3) for n, p in enumerate(PROMPTS)]
    (state / "one").mkdir()
    (state / "many").mkdir()
    with running_stack(state / "one", "--device", "cpu") as stack:
        jobs = [stack.client.wait(job.id, 120) for job in stack.client.submit_many(requests)]
        alone = [stack.pictures(job.id) for job in jobs]
    with running_stack(state / "many", "--device", "cpu", "--batch", "3") as stack:
        jobs = [stack.client.wait(job.id, 120) for job in stack.client.submit_many(requests)]
        batched = [stack.pictures(job.id) for job in jobs]
        kept = tmp_path / "one.png"
        assert triptych("wait", jobs[0].id, "-o", str(kept), folder=state / "many").returncode == 0
        again = triptych("retry", str(kept), folder=state / "many")
        assert again.returncode == 2
        assert "in batches" in again.stderr
    assert {job.recipe.tier for job in jobs} == {"numeric"}
    for one, other in zip(batched, alone, strict=True):
        assert (one.int() - other.int()).abs().max() <= 2
    assert not torch.equal(alone[0], alone[1])

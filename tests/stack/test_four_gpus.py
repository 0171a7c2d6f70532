"""Whole stacks on four GPUs, which a CPU plays: of equal and of unequal sizes, split, in pairs, killed one by one."""

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from protocol.job import JobRequest
from protocol.messages.client import Workers
from tests import tiny
from tests.stack.test_placements import PROMPTS, SIZE, make_all, on_gpus
from tests.stack.test_stack import until
from tests.stacks import RunningStack, running_stack
from tests.tiny import plain

UNEQUAL = (6_000_000, 4_000_000, 3_000_000, 2_000_000)  # in the proportions of cards of 24, 16, 12 and 8 GB


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=3), tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def wanted(deep: Path) -> list[torch.Tensor]:
    return [
        plain(deep, prompt=prompt, seed=seed, width=32, height=32, num_inference_steps=6)
        for seed, prompt in enumerate(PROMPTS)
    ]


def within_budgets(workers: Workers, sizes: tuple[int, ...]) -> bool:
    """Return whether the leases on each GPU are within what it gives."""
    held = [0] * len(sizes)
    for worker in workers.workers:
        for gpu, size in zip(worker.gpus, worker.lease_bytes, strict=False):
            held[gpu] += size
    return all(size <= most for size, most in zip(held, sizes, strict=True))


def denoisers(stack: RunningStack) -> list[tuple[int, ...]]:
    return sorted(w.gpus for w in stack.client.workers().workers if w.stage == "denoise")


@pytest.mark.all
def test_a_denoiser_cut_over_four_unequal_gpus_has_four_jobs_in_hand(
    deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    with running_stack(state, *on_gpus(deep, UNEQUAL, "--placement", "split", "--workers", "denoise=1")) as stack:
        workers = [w for w in stack.client.workers().workers if w.stage == "denoise"]
        assert (len(workers), len({w.pid for w in workers})) == (4, 1)
        ids = make_all(stack)
        for job, picture in zip(ids, wanted, strict=True):
            assert torch.equal(stack.pictures(job), picture)
        assert within_budgets(stack.client.workers(), UNEQUAL)
        (mapped,) = (w for w in workers if w.device_map)  # told once
        assert mapped.gpus == (0, 1, 2, 3)
        assert {place for _, place in mapped.device_map} == {f"cpu (part {part})" for part in (1, 2, 3, 4)}
        os.kill(workers[0].pid, signal.SIGKILL)
        assert make_all(stack)


@pytest.mark.all
def test_replicas_on_four_unequal_gpus_are_killed_one_by_one(
    deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    arguments = on_gpus(deep, UNEQUAL, "--placement", "replicas", "--checkpoint", "0")
    with running_stack(state, *arguments) as stack:
        assert denoisers(stack) == [(0,), (1,), (2,), (3,)]
        make_all(stack)  # so that the prompts are known
        long = {**SIZE, "steps": 60}
        jobs = [job.id for job in stack.client.submit_many([JobRequest(prompt=p, seed=1, **long) for p in PROMPTS])]
        for gpu in range(4):
            found = until(stack, lambda w: sum(x.stage == "denoise" and bool(x.job) for x in w.workers) >= 1)
            victim = next(w for w in found.workers if w.stage == "denoise" and w.gpus == (gpu,))
            if psutil.pid_exists(victim.pid):
                os.kill(victim.pid, signal.SIGKILL)
        assert [stack.client.wait(job, 240).state for job in jobs] == ["done"] * 4
        again = make_all(stack)
        for job, picture in zip(again, wanted, strict=True):
            assert torch.equal(stack.pictures(job), picture)
        until(stack, lambda w: sum(x.stage == "denoise" for x in w.workers) == 4)
        assert within_budgets(stack.client.workers(), UNEQUAL)


@pytest.mark.all
def test_two_pairs_of_parallel_ranks_are_two_workers_with_the_same_bits(
    deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    arguments = on_gpus(deep, (2_600_000,) * 4, "--placement", "tensor", "--workers", "denoise=2")
    with running_stack(state, *arguments) as stack:
        assert denoisers(stack) == [(0, 1), (2, 3)]
        first = [stack.pictures(job) for job in make_all(stack)]
        for made, picture in zip(first, wanted, strict=True):
            assert np.abs(made.numpy().astype(int) - picture.numpy().astype(int)).max() <= 1
        long = {**SIZE, "steps": 100}
        jobs = [job.id for job in stack.client.submit_many([JobRequest(prompt=p, seed=1, **long) for p in PROMPTS[:2]])]
        found = until(stack, lambda w: sum(x.stage == "denoise" and bool(x.job) for x in w.workers) == 2)
        victim, other = (w for w in found.workers if w.stage == "denoise")
        (rank,) = psutil.Process(victim.pid).children()
        rank.kill()  # and so that whole pair, but not the other one
        assert [stack.client.wait(job, 240).state for job in jobs] == ["done"] * 2
        assert victim.job
        assert other.job
        assert stack.client.job(victim.job).reasons
        assert stack.client.job(other.job).reasons == ()
        for job, picture in zip(make_all(stack), first, strict=True):
            assert torch.equal(stack.pictures(job), picture)


@pytest.mark.all
def test_two_models_share_four_unequal_gpus(deep: Path, wanted: list[torch.Tensor], state: Path) -> None:
    arguments = on_gpus(deep, tuple(size // 2 for size in UNEQUAL), "--placement", "replicas")
    other = ("--model", f"other={deep}")
    with running_stack(state, *arguments, *other) as stack:
        name = stack.client.models()[0].name
        requests = [
            JobRequest(prompt=prompt, seed=seed, model=model, **SIZE)
            for seed, prompt in enumerate(PROMPTS)
            for model in (name, "other")
        ]
        ids = [job.id for job in stack.client.submit_many(requests)]
        for job in ids:
            stack.client.wait(job, 240)
        for number, job in enumerate(ids):
            assert torch.equal(stack.pictures(job), wanted[number // 2])
        assert within_budgets(stack.client.workers(), tuple(size // 2 for size in UNEQUAL))

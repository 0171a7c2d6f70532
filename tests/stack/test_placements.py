"""Whole stacks on several GPUs, which a CPU plays: every placement with the bits that it promises."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from orchestrator.cli.strays import strays
from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.messages.client import Workers
from tests import tiny
from tests.pictures import noise, plain_of_picture
from tests.stack.test_stack import until
from tests.stacks import RunningStack, running_stack, triptych
from tests.tiny import plain

SIZE = {"width": 32, "height": 32, "steps": 6}
PROMPTS = [f"a red circle {number}" for number in range(4)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=3), tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def wanted(deep: Path) -> list[torch.Tensor]:
    return [
        plain(deep, prompt=prompt, seed=seed, width=32, height=32, num_inference_steps=6)
        for seed, prompt in enumerate(PROMPTS)
    ]


def on_two(model: Path, budget: int, *arguments: str) -> list[str]:
    """Two GPUs of so many bytes."""
    return on_gpus(model, [budget, budget], *arguments)


def on_gpus(model: Path, sizes: Sequence[int], *arguments: str) -> list[str]:
    """GPUs of so many bytes, each."""
    budgets = [part for gpu, size in enumerate(sizes) for part in ("--budget", f"{gpu}={size}B")]
    return ["--model", str(model), "--device", f"cpu:{','.join(map(str, range(len(sizes))))}", *budgets, *arguments]


def make_all(stack: RunningStack) -> list[str]:
    requests = [JobRequest(prompt=prompt, seed=seed, **SIZE) for seed, prompt in enumerate(PROMPTS)]
    ids = [job.id for job in stack.client.submit_many(requests)]
    for job in ids:
        stack.client.wait(job, 240)
    return ids


def test_replicas_share_the_work_with_the_bits_of_one_process(
    deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    with running_stack(state, *on_two(deep, 900_000)) as stack:  # less than a denoiser takes
        denoisers = {w.name: w.gpus for w in stack.client.workers().workers if w.stage == "denoise"}
        assert sorted(denoisers.values()) == [(0,), (1,)]
        ids = make_all(stack)
        for job, picture in zip(ids, wanted, strict=True):
            assert torch.equal(stack.pictures(job), picture)
        used = {r.worker for job in ids for r in stack.client.job(job).records if r.stage == "denoise"}
        assert used <= set(denoisers)  # a fast one may do all of them
        assert {stack.client.job(job).recipe.tier for job in ids} == {"exact"}
        long = stack.client.submit(PROMPTS[0], seed=1, **{**SIZE, "steps": 300}).id
        until(  # a worker that is done may have given its weights' place to another stage already
            stack,
            lambda w: any(x.job == long and x.residency and x.residency[0].state == "streamed" for x in w.workers),
        )
        stack.client.cancel(long)


def test_a_replica_that_dies_disturbs_nobody_else(deep: Path, wanted: list[torch.Tensor], state: Path) -> None:
    long = {"width": 32, "height": 32, "steps": 150}
    with running_stack(state, *on_two(deep, 4_000_000), "--checkpoint", "0") as stack:
        make_all(stack)  # so that the prompts are known, and both denoisers begin at once
        jobs = [job.id for job in stack.client.submit_many([JobRequest(prompt=p, seed=1, **long) for p in PROMPTS[:2]])]
        found = until(stack, lambda w: sum(x.stage == "denoise" and x.job is not None for x in w.workers) == 2)
        victim, other = (w for w in found.workers if w.stage == "denoise")
        os.kill(victim.pid, signal.SIGKILL)
        for job in jobs:
            stack.client.wait(job, 240)
        assert victim.job
        assert other.job
        assert stack.client.job(victim.job).reasons
        assert stack.client.job(other.job).reasons == ()
        (again,) = (r for r in stack.client.job(other.job).records if r.stage == "denoise")
        assert again.worker == other.name
        assert make_all(stack)


def test_a_split_denoiser_has_two_jobs_in_hand_with_the_bits_of_one_process(
    deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    with running_stack(state, *on_two(deep, 4_000_000, "--placement", "split")) as stack:
        workers = [w for w in stack.client.workers().workers if w.stage == "denoise"]
        assert [w.name for w in workers] == ["denoise-1", "denoise-1.2"] or len(workers) == 2
        assert len({w.pid for w in workers}) == 1
        ids = make_all(stack)
        for job, picture in zip(ids, wanted, strict=True):
            assert torch.equal(stack.pictures(job), picture)
        used = {r.worker for job in ids for r in stack.client.job(job).records if r.stage == "denoise"}
        assert used == {w.name for w in workers}
        mapped = [w for w in workers if w.device_map]
        assert [w.name for w in mapped] == ["denoise-1"]  # told once
        assert {place for _, place in mapped[0].device_map} == {"cpu (part 1)", "cpu (part 2)"}
        assert [c.component for c in mapped[0].residency] == ["transformer, part 1", "transformer, part 2"]
        with pytest.raises(BadRequest, match="planned in advance"):
            stack.client.scale("denoise", 3)
        os.kill(workers[0].pid, signal.SIGKILL)
        until(stack, lambda w: len({x.pid for x in w.workers if x.stage == "denoise"} - {workers[0].pid}) == 1)
        assert make_all(stack)


@pytest.mark.parametrize("kind", [pytest.param("context", marks=pytest.mark.all), "tensor"])
@pytest.mark.all
def test_parallel_ranks_are_one_worker_that_dies_and_comes_back_as_one(
    kind: str, deep: Path, wanted: list[torch.Tensor], state: Path
) -> None:
    with running_stack(state, *on_two(deep, 2_600_000, "--placement", kind)) as stack:
        (worker,) = (w for w in stack.client.workers().workers if w.stage == "denoise")
        assert worker.device_map == () or kind in json.dumps(worker.device_map)
        job, picture = stack.picture(PROMPTS[0], seed=0, **SIZE)
        assert (job.recipe.tier, job.recipe.speedups) == ("numeric", (f"denoise:parallel={kind}-2",))
        assert np.abs(picture.numpy().astype(int) - wanted[0].numpy().astype(int)).max() <= 1
        image = noise()
        of_picture = plain_of_picture(
            deep, image, prompt=PROMPTS[0], strength=0.5, seed=4, width=32, height=32, num_inference_steps=6
        )
        _, made = stack.picture(PROMPTS[0], images=image, strength=0.5, seed=4, **SIZE)
        assert np.abs(made.numpy().astype(int) - of_picture.numpy().astype(int)).max() <= 1
        again, same = stack.picture(PROMPTS[0], seed=0, **SIZE)
        assert again.id != job.id
        assert torch.equal(same, picture)

        long = stack.client.submit(PROMPTS[1], seed=1, **{**SIZE, "steps": 300})
        until(stack, lambda w: any(x.job == long.id and x.stage == "denoise" for x in w.workers))
        stack.client.cancel(long.id)  # all ranks leave the loop at the same step
        stack.picture(PROMPTS[2], seed=2, **SIZE)

        (rank,) = psutil.Process(worker.pid).children()
        rank.kill()  # and so the whole worker
        until(
            stack, lambda w: any(x.stage == "denoise" and x.pid != worker.pid and x.state == "idle" for x in w.workers)
        )
        assert not psutil.pid_exists(worker.pid)
        assert torch.equal(stack.picture(PROMPTS[0], seed=0, **SIZE)[1], picture)


@pytest.mark.parametrize(
    "kind", ["split", pytest.param("context", marks=pytest.mark.all), pytest.param("tensor", marks=pytest.mark.all)]
)
def test_what_lies_on_several_gpus_is_lent_and_given_back_when_idle(kind: str, deep: Path, state: Path) -> None:
    budget = 2_600_000
    with running_stack(state, *on_two(deep, budget, "--placement", kind, "--keep-alive", "denoise=0")) as stack:

        def leases(workers: Workers) -> list[int]:
            return [size for worker in workers.workers if worker.stage == "denoise" for size in worker.lease_bytes]

        _, picture = stack.picture(PROMPTS[0], seed=0, **SIZE)
        until(stack, lambda w: leases(w) == [0, 0])
        assert "holds 0 B of GPU 0, 0 B of GPU 1" in triptych("workers", folder=state).stdout
        long = stack.client.submit(PROMPTS[1], seed=1, **{**SIZE, "steps": 300})
        held = until(stack, lambda w: all(leases(w)) and any(x.job == long.id for x in w.workers))
        for gpu in (0, 1):
            sizes = [w.lease_bytes[w.gpus.index(gpu)] for w in held.workers if w.lease_bytes and gpu in w.gpus]
            assert 0 < sum(sizes) <= budget
        stack.client.cancel(long.id)
        assert torch.equal(stack.picture(PROMPTS[0], seed=0, **SIZE)[1], picture)


@pytest.mark.all
def test_jobs_of_another_placement_wait_and_say_for_what(deep: Path, state: Path) -> None:
    with running_stack(state, *on_two(deep, 2_600_000, "--placement", "context")) as stack:
        job = stack.client.submit(PROMPTS[0], seed=1, **{**SIZE, "steps": 300})
        until(stack, lambda w: any(x.job == job.id and x.stage == "denoise" for x in w.workers))
    with running_stack(state, *on_two(deep, 4_000_000)) as stack:
        told = triptych("show", job.id, folder=state)
        assert "no worker of this stack is what it was accepted for" in told.stdout
        assert "denoise:parallel=context-2" in told.stdout
        assert "1 unfinished job(s) wait" in strays(stack.client)
        done = stack.picture(PROMPTS[0], seed=1, **SIZE)[0]
        assert "waits:" not in triptych("show", done.id, folder=state).stdout
        stack.client.cancel(job.id)
        assert strays(stack.client) == ""


def test_what_cannot_work_is_refused_before_anything_is_loaded(deep: Path, state: Path) -> None:
    refused = triptych("up", *on_two(deep, 90_000), folder=state)
    assert refused.returncode == 5, refused.stderr
    assert "takes at least" in refused.stderr
    assert "it would fit" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list((state / "logs").glob("denoise*"))
    split = triptych("up", *on_two(deep, 300_000, "--placement", "split"), folder=state)
    assert (split.returncode, "layers of denoise" in split.stderr) == (5, True)


@pytest.mark.all
def test_plan_says_what_up_would_do(deep: Path, state: Path) -> None:
    arguments = on_two(deep, 4_000_000, "--size", "32x32", "--steps", "4")
    done = triptych("plan", *arguments, "--json", folder=state)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {worker["stage"] for worker in found["workers"]} == {"text", "denoise", "vae"}
    assert all(gpu["used"] <= gpu["budget"] == 4_000_000 for gpu in found["gpus"])
    assert found["picture"] == {"width": 32, "height": 32, "steps": 4, "dtype": "float32"}
    assert {other["placement"] for other in found["placements"]} == {"replicas", "split"}
    told = triptych("plan", "--model", str(deep), "--gpus", "RTX 4090:24GB,12GB", "--link", "25GB/s", "--ram", "64GB")
    assert told.returncode == 0, told.stderr
    assert "GPU 0: RTX 4090, 24.0 GB, 25.0 GB/s from memory" in told.stdout
    assert "a picture every" in told.stdout
    for wrong, words in (
        (("--gpus", "lots"), "lots"),
        (("--gpus", "16GB", "--link", "fast"), "--link"),
        (("--gpus", "16GB", "--gpus", "12GB"), "given twice"),
        (("--gpus", "16GB", "--placement", "tensor"), "takes several GPUs"),
        (("--gpus", "16GB", "--budget", "1=8GB"), "no GPU 1"),
        (("--gpus", "16,16GB"), "'16' is no GPU"),
        (("--gpus", "RTX 4090:24GB:3GB"), "is no GPU"),
        (("--gpus", "97"), "to use GPU 97"),
        (("--gpus", "16GB", "--link", "25Gb/s"), "--link"),
        (("--device", "lots"), "'lots' is no device"),
        (("--dtype", "float8"), "dtype"),
    ):
        refused = triptych("plan", "--model", str(deep), *wrong)
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    four = ("plan", "--model", str(deep), "--gpus", ",".join(["16GB"] * 4), "--placement", "tensor", "--json")
    workers = json.loads(triptych(*four).stdout)["workers"]
    pairs = [[gpu["gpu"] for gpu in worker["gpus"]] for worker in workers if worker["stage"] == "denoise"]
    assert pairs == [[0, 1], [2, 3]]  # two heads can't be shared out among four
    uneven = triptych(*four, "--workers", "denoise=1")
    assert (uneven.returncode, "heads of attention" in uneven.stderr) == (5, True)
    missing = triptych("plan", "--model", "nobody/nothing", "--gpus", "16GB")
    assert (missing.returncode, "Traceback" in missing.stderr) == (4, False)


@pytest.mark.all
def test_paces_are_learned_and_planned_with(deep: Path, state: Path) -> None:
    arguments = on_two(deep, 4_000_000)
    with running_stack(state, *arguments) as stack:
        for _ in range(3):
            make_all(stack)
    sized = ("--size", "32x32", "--steps", "6", "--json")
    seen = json.loads(triptych("plan", *arguments, *sized, folder=state).stdout)
    guessed = json.loads(triptych("plan", *arguments, *sized, folder=state.with_name("other")).stdout)
    step = {name: [w["step_seconds"] for w in p["workers"] if w["stage"] == "denoise"] for name, p in
            (("seen", seen), ("guessed", guessed))}  # fmt: skip
    assert step["seen"] != step["guessed"]

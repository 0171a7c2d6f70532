"""A simulated stack does every job, within its budgets, and is the same each time."""

import bisect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.planning.hardware import Hardware, imagined
from orchestrator.planning.planner import Plan, choose
from orchestrator.planning.prediction import Terms
from orchestrator.scheduling.autoscaling import ScalingTerms
from orchestrator.settings import StackConfig
from protocol.model_profile import ModelProfile
from scripts.simulate.bound import most_done
from scripts.simulate.costs import Arrival, task_seconds
from scripts.simulate.outages import draw, losses
from scripts.simulate.run import FLUX, arrivals, on_each_host, report, simulate
from scripts.simulate.world import World

MODEL = ModelProfile.model_validate_json(FLUX.read_bytes())
TERMS = Terms()


def planned(*gpus: str) -> tuple[Plan, Hardware]:
    hardware = Hardware(imagined(",".join(gpus)), ram=1 << 40)
    return choose(StackConfig(placement="replicas"), MODEL, hardware, TERMS), hardware


@pytest.mark.parametrize("trace", ["poisson", "bursts", "day"])
def test_traces_bring_as_many_jobs_as_they_should_and_the_same_ones_each_time(trace: str) -> None:
    found = arrivals(trace, 0.1, 86400.0, 0.2, 1)
    assert found == arrivals(trace, 0.1, 86400.0, 0.2, 1)
    assert len(found) == pytest.approx(8640, rel=0.15)
    assert sum(arrival.cached for arrival in found) == pytest.approx(0.2 * len(found), rel=0.1)
    assert [arrival.at for arrival in found] == sorted(arrival.at for arrival in found)
    night, noon = (sum(start <= a.at % 86400 < start + 7200 for a in found) for start in (3 * 3600, 15 * 3600))
    assert (noon > 2 * night) == (trace == "day")


@pytest.mark.parametrize("gpus", [("H200:16GiB",), ("H200:8GiB",), ("H200:16GiB", "RTX 4090:24GB", "RTX 3060:12GB")])
def test_all_jobs_are_done_with_fewer_swaps_than_others_need(gpus: tuple[str, ...]) -> None:
    plan, hardware = planned(*gpus)
    jobs = arrivals("bursts", 0.7 / plan.prediction.job_seconds, 7200.0, 0.2, 3)
    found = simulate(plan.posts, MODEL, hardware, TERMS, jobs)
    told = {policy: report(policy, tally, len(gpus), took) for policy, (tally, took) in found.items()}
    assert {row["jobs"] for row in told.values()} == {len(jobs)}
    assert told["triptych"]["swaps"] < told["first come first served"]["swaps"] < told["whole pipelines"]["swaps"]
    assert told["triptych"]["gpu_swapping"] < 0.2 * told["whole pipelines"]["gpu_swapping"]
    assert all(end > begin for tally, _ in found.values() for begin, end in tally.times)
    again = World(plan.posts, MODEL, hardware, TERMS).run(jobs)
    assert again.times == found["triptych"][0].times


def test_a_full_queue_is_worked_off_at_the_planned_pace() -> None:
    plan, hardware = planned("H200:16GiB", "H200:16GiB")
    tally = World(plan.posts, MODEL, hardware, TERMS).run([Arrival(0.0, False)] * 200)
    end = max(end for _, end in tally.times)
    assert end / 200 == pytest.approx(plan.prediction.job_seconds, rel=0.06)


def test_the_bound_is_what_gpus_that_never_wait_could_do() -> None:
    times = [0.0] * 100
    assert most_done(times, 10.0, 10.0, 5, [], [10.0, 100.0, 200.0, 300.0]) == pytest.approx([5, 50, 100, 100])
    assert most_done(times, 10.0, 10.0, 5, [(50.0, -5), (150.0, 5)], [100.0, 300.0]) == pytest.approx([25, 100])
    assert most_done([0.0, 95.0], 10.0, 10.0, 5, [], [9.0, 96.0, 200.0])[-1] == pytest.approx(2)


def test_hosts_that_fail_and_links_that_are_cut_cost_what_they_must_and_no_job() -> None:
    plan, hardware = planned(*["RTX 4080:16GB"] * 2)
    hardware = Hardware(imagined(",".join(["RTX 4080:16GB"] * 8)), ram=1 << 40)
    posts = on_each_host(plan, 4, 2)
    outages = draw(4, 4 * 3600.0, 12.0, 60.0, 5)
    assert {outage.kind for outage in outages} == {"down", "cut"}
    assert any(not outage.noticed for outage in outages)
    jobs = arrivals("poisson", 1.2 * 4 / plan.prediction.job_seconds, 4 * 3600.0, 0.2, 3)
    found = simulate(posts, MODEL, hardware, TERMS, jobs, 2, outages)
    assert {policy: len(tally.times) for policy, (tally, _) in found.items()} == dict.fromkeys(found, len(jobs))
    ends = {policy: sorted(end for _, end in tally.times) for policy, (tally, _) in found.items()}
    marks = [3600.0 * hour for hour in range(1, 5)]
    fastest = task_seconds(MODEL.stage("denoise"), hardware.cards[0], 1 << 60, False)
    bound = most_done([job.at for job in jobs], fastest, fastest, 8, losses(outages, 2), marks)
    for mark, most in zip(marks, bound, strict=True):
        assert 0.92 * most <= bisect.bisect_right(ends["triptych"], mark) <= most + 1
    assert found["triptych"][0].again < found["whole pipelines"][0].again  # checkpoints


def test_hosts_come_and_go_with_the_work() -> None:
    plan, _ = planned(*["RTX 4080:16GB"] * 2)
    hardware = Hardware(imagined(",".join(["RTX 4080:16GB"] * 8)), ram=1 << 40)
    jobs = [Arrival(at, False) for at in [0.0] * 100 + [40_000.0] * 3]
    scaling = ScalingTerms(gpus=2, most=4, least=0, start_seconds=60.0)
    tally = World(on_each_host(plan, 4, 2), MODEL, hardware, TERMS, 2, scaling=scaling).run(jobs)
    assert len(tally.times) == len(jobs)
    counts = [count for _, count in tally.hosts]
    assert max(counts) == 4
    assert min(counts) == 0
    assert tally.host_hours(40_000.0) < 1.5 * 100 * plan.prediction.job_seconds / 3600 + 4 * 4 * 60 / 3600


def test_the_script_prints_a_line_for_each_way_and_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.simulate.run", "--gpus", "2", "--hours", "1"]
    command += ["--plot", str(tmp_path / "x.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *rows = map(json.loads, done.stdout.splitlines())
    assert first["gpus"] == 2
    assert [row["policy"] for row in rows] == ["triptych", "first come first served", "whole pipelines"]
    assert "<svg" in (tmp_path / "x.svg").read_text()

"""A simulated stack does every job, within its budgets, and is the same each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.planning.hardware import Hardware, imagined
from orchestrator.planning.planner import Plan, choose
from orchestrator.planning.prediction import Terms
from orchestrator.settings import StackConfig
from protocol.model_profile import ModelProfile
from scripts.simulate.run import FLUX, arrivals, report, simulate
from scripts.simulate.world import Arrival, World

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
    found = simulate(plan, MODEL, hardware, TERMS, jobs)
    told = {policy: report(policy, tally, len(gpus), took) for policy, (tally, took) in found.items()}
    assert {row["jobs"] for row in told.values()} == {len(jobs)}
    assert told["triptych"]["swaps"] < told["first come first served"]["swaps"] < told["each job by itself"]["swaps"]
    assert told["triptych"]["gpu_swapping"] < 0.2 * told["each job by itself"]["gpu_swapping"]
    assert all(end > begin for tally, _ in found.values() for begin, end in tally.times)
    again = World(plan, MODEL, hardware, TERMS).run(jobs)
    assert again.times == found["triptych"][0].times


def test_a_full_queue_is_worked_off_at_the_planned_pace() -> None:
    plan, hardware = planned("H200:16GiB", "H200:16GiB")
    tally = World(plan, MODEL, hardware, TERMS).run([Arrival(0.0, False)] * 200)
    end = max(end for _, end in tally.times)
    assert end / 200 == pytest.approx(plan.prediction.job_seconds, rel=0.06)


def test_the_script_prints_a_line_for_each_way_and_draws(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.simulate.run", "--gpus", "2", "--hours", "1"]
    command += ["--plot", str(tmp_path / "x.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *rows = map(json.loads, done.stdout.splitlines())
    assert first["gpus"] == 2
    assert [row["policy"] for row in rows] == ["triptych", "first come first served", "each job by itself"]
    assert "<svg" in (tmp_path / "x.svg").read_text()

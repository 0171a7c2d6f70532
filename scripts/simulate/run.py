"""Simulate a stack with a day's jobs: the real scheduler and plan, in simulated time.

    python -m scripts.simulate.run --gpus 100 --card "RTX 4080:16GB" --trace day --plot day.svg
    python -m scripts.simulate.run --gpus 1000 --hosts 125 --downs 1 --cuts 4 --load 0.8
    python -m scripts.simulate.run --gpus 64 --hosts 8 --autoscale 1 --load 0.3

Jobs arrive by a trace: `poisson` at a steady rate, `bursts` of many at once, or a `day` with a quiet night and a busy
afternoon; `--load` is their work, on average, as a share of what the plan says the GPUs can do. Beside it run the same
jobs first come first served, and by replicas of whole pipelines as Ray Serve has them, every stage swapped in for each
job. Hosts fail and links are cut for all three, by chance. Prints one JSON line for each; `of_bound` is the smallest
share, at any full hour, of the jobs that could be done by then if no GPU ever waited.
"""

import bisect
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from orchestrator.planning.hardware import Hardware, imagined, with_link
from orchestrator.planning.placement import Post
from orchestrator.planning.planner import Plan, choose
from orchestrator.planning.prediction import Terms
from orchestrator.scheduling.autoscaling import ScalingTerms
from orchestrator.settings import StackConfig
from protocol.model_profile import ModelProfile
from scripts.simulate.bound import most_done
from scripts.simulate.costs import Arrival, Tally, task_seconds
from scripts.simulate.others import Servers
from scripts.simulate.outages import Outage, draw, losses
from scripts.simulate.world import World

FLUX = Path(__file__).with_name("flux_dev.json")
DAY = 86400.0
BURST = 40  # jobs at once, on average
QUIET = 0.15  # of the mean rate, at night


def arrivals(trace: str, rate: float, seconds: float, known: float, seed: int) -> list[Arrival]:
    """Jobs at `rate` a second on average; a share `known` of them has a prompt that was seen before."""
    chance = random.Random(seed)
    found: list[Arrival] = []
    at = 0.0
    peak = rate * (2 - QUIET)  # of the day's curve
    while True:
        match trace:
            case "poisson":
                at, count = at + chance.expovariate(rate), 1
            case "bursts":
                at, count = at + chance.expovariate(rate / BURST), 1 + int(chance.expovariate(1 / BURST))
            case _:  # thinned from its peak
                at, count = at + chance.expovariate(peak), 1
                if chance.random() * peak > rate * (1 + (1 - QUIET) * math.sin(2 * math.pi * (at / DAY - 0.375))):
                    count = 0
        if at >= seconds:
            return found
        found += [Arrival(at, chance.random() < known) for _ in range(count)]


def report(policy: str, tally: Tally, gpus: int, took: float, **more: Any) -> dict[str, Any]:
    """Seconds, and shares of all GPU time from the first arrival to the last picture."""
    end = max((end for _, end in tally.times), default=0.0)
    begin = min((begin for begin, _ in tally.times), default=0.0)
    total = max(1e-9, (end - begin) * gpus)
    waits, whole = sorted(tally.waits), sorted(end - begin for begin, end in tally.times)
    hours = max(1e-9, end - begin) / 3600
    return {
        "policy": policy, "jobs": len(tally.times), "pictures_an_hour": len(tally.times) / hours,
        "wait_p50": at(waits, 0.5), "wait_p99": at(waits, 0.99), "job_p50": at(whole, 0.5), "job_p99": at(whole, 0.99),
        "swaps": tally.swaps, "gpu_use": tally.busy / total, "gpu_swapping": tally.swapping / total,
        "gpu_again": tally.again / total,
        "simulated_hours": hours, "took_seconds": took, **more,
    }  # fmt: skip


def at(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of them lies, of values in order."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def simulate(
    posts: Sequence[Post], profile: ModelProfile, hardware: Hardware, terms: Terms, jobs: Sequence[Arrival],
    gpus: int = 0, outages: Sequence[Outage] = (), scaling: ScalingTerms | None = None,
) -> dict[str, tuple[Tally, float]]:  # fmt: skip
    """Return the tallies by policy, with the seconds that each took to simulate; `gpus` are those of a host."""
    each = gpus or len(hardware.cards)
    runs = {
        "triptych": lambda: World(posts, profile, hardware, terms, each, outages, scaling).run(jobs),
        "first come first served": lambda: Servers(profile, hardware, terms, False, outages, each).run(jobs),
        "whole pipelines": lambda: Servers(profile, hardware, terms, True, outages, each).run(jobs),
    }
    found: dict[str, tuple[Tally, float]] = {}
    for policy, run in runs.items():
        start = time.perf_counter()
        found[policy] = run(), time.perf_counter() - start
    return found


def on_each_host(plan: Plan, hosts: int, gpus: int) -> list[Post]:
    """Return the posts of a plan on each of so many hosts that are alike, as each host of a stack has its own."""
    return [
        replace(post, gpus=tuple(gpu + host * gpus for gpu in post.gpus))
        for host in range(hosts)
        for post in plan.posts
    ]


def plot(path: Path, found: dict[str, tuple[Tally, float]], jobs: Sequence[Arrival], title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rates, waits, weights) = pyplot.subplots(3, 1, figsize=(9, 11), layout="constrained")
    hours = max(1, math.ceil(max((end for tally, _ in found.values() for _, end in tally.times), default=0) / 3600))
    bins = [3600 * h / 4 for h in range(4 * hours + 1)]
    rates.hist([job.at for job in jobs], bins=bins, histtype="stepfilled", alpha=0.3, label="arrivals")
    for policy, (tally, _) in found.items():
        rates.hist([end for _, end in tally.times], bins=bins, histtype="step", label=policy)
        ordered = sorted(tally.waits)
        waits.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=policy)
    rates.set(xlabel="seconds", ylabel="jobs in a quarter of an hour", title=title)
    waits.set(xlabel="seconds until the first denoising step", ylabel="share of jobs", xscale="symlog")
    names = list(found)
    spans = [max((end for _, end in tally.times), default=1.0) for tally, _ in found.values()]
    busy = [tally.busy / span for (tally, _), span in zip(found.values(), spans, strict=True)]
    swapping = [tally.swapping / span for (tally, _), span in zip(found.values(), spans, strict=True)]
    weights.barh(names, busy, label="computing")
    weights.barh(names, swapping, left=busy, label="swapping")
    weights.set(xlabel="GPUs in use on average")
    for axes in (rates, waits, weights):
        axes.legend()
    figure.savefig(path)


@click.command(help=__doc__.split("\n")[0])
@click.option("--gpus", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--card", default="RTX 4080:16GB", show_default=True, help="NAME:MEMORY of each")
@click.option("--link", help="bytes a second from memory, such as 25GB/s")
@click.option(
    "--profile",
    type=click.Path(exists=True, path_type=Path),
    default=FLUX,
    help="of a model, as 'python -m workers.profile.measure' prints them  [default: FLUX.1-dev's, 1024x1024]",
)
@click.option("--trace", type=click.Choice(["poisson", "bursts", "day"]), default="day", show_default=True)
@click.option("--load", default=0.5, show_default=True, help="of what the plan says they can do, on average")
@click.option("--hosts", type=click.IntRange(1), default=1, show_default=True, help="that have as many GPUs each")
@click.option("--downs", default=0.0, show_default=True, help="times in 24 hours that a host fails, for minutes")
@click.option("--cuts", default=0.0, show_default=True, help="times in 24 hours that its link is cut, for seconds")
@click.option("--autoscale", type=click.IntRange(0), help="hosts at least; the others come when they are worth it")
@click.option("--start", default=60.0, show_default=True, help="seconds that a host takes to come")
@click.option("--hours", default=24.0, show_default=True)
@click.option("--known", default=0.2, show_default=True, help="share of jobs whose prompt was seen before")
@click.option("--compile", "compiled", is_flag=True)
@click.option("--patience", default=30.0, show_default=True, help="seconds that a task waits for a stage's turn")
@click.option("--seed", default=0, show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="an SVG, PNG or PDF to draw")
def main(
    gpus: int, card: str, link: str | None, profile: Path, trace: str, load: float, hosts: int, downs: float,
    cuts: float, autoscale: int | None, start: float, hours: float, known: float, compiled: bool, patience: float,
    seed: int, picture: Path | None,
) -> None:  # fmt: skip
    if gpus % hosts:
        raise click.BadParameter(f"{gpus} GPUs can't be shared out evenly among {hosts} hosts")
    model, each = ModelProfile.model_validate_json(profile.read_bytes()), gpus // hosts
    hardware = Hardware(imagined(",".join([card] * gpus)), ram=1 << 60)
    hardware = with_link(hardware, link) if link else hardware
    config = StackConfig(placement="replicas", compile=compiled, patience=patience)
    terms = Terms(compiled, patience)
    plan = choose(config, model, replace(hardware, cards=hardware.cards[:each]), terms)
    jobs = arrivals(trace, load * hosts / plan.prediction.job_seconds, hours * 3600, known, seed)
    planned = plan.prediction.pictures_an_hour * hosts
    posts = on_each_host(plan, hosts, each)
    outages = draw(hosts, hours * 3600, downs, cuts, seed)
    failed = sum(outage.kind == "down" for outage in outages)
    asked = {"gpus": gpus, "hosts": hosts, "card": card, "trace": trace, "load": load, "seed": seed, "jobs": len(jobs),
             "hosts_failed": failed, "links_cut": len(outages) - failed}  # fmt: skip
    print(json.dumps({**asked, "plan": plan.why, "planned_pictures_an_hour": planned}), flush=True)
    scaling = None if autoscale is None else ScalingTerms(each, hosts, autoscale, start, patience)
    found = simulate(posts, model, hardware, terms, jobs, each, outages, scaling)
    marks = [3600.0 * hour for hour in range(1, math.ceil(hours) + 1)]
    fastest = min(task_seconds(model.stage("denoise"), card, 1 << 60, compiled) for card in hardware.cards)
    bound = most_done([job.at for job in jobs], fastest, fastest, gpus, losses(outages, each), marks)
    for policy, (tally, took) in found.items():
        ends = sorted(end for _, end in tally.times)
        shares = [
            bisect.bisect_right(ends, mark) / most for mark, most in zip(marks, bound, strict=True) if most > gpus
        ]
        more = {"of_bound": min(shares, default=None), "host_hours": tally.host_hours(ends[-1] if ends else 0.0)}
        print(json.dumps(report(policy, tally, gpus, took, **more)), flush=True)
    if picture:
        plot(picture, found, jobs, f"FLUX.1-dev on {gpus} × {card}, {trace}, load {load:g}")


if __name__ == "__main__":
    main()

"""Seconds of a decision of the scheduler beside many GPUs whose workers work in leases: the real engine, no sockets.

    python -m scripts.bench.decisions --gpus 1000 --jobs 4000

Hosts of eight GPUs, a denoiser on each, text encoders on the first and a VAE on the last, which can not all be in;
tasks take as long as FLUX.1-dev's on an RTX 4080, by the world's clock. Prints one JSON line.
"""

import heapq
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import click

from orchestrator.dispatch.standstill import TICK_SECONDS
from orchestrator.memory.margins import FIRST_HEADROOM
from protocol.gpu_memory import WeightNeed
from protocol.messages.worker import Task
from protocol.stages import Stage
from tests.memory_world import Sim, World

MB = 10**6
EACH = 8  # GPUs of a host


class SlowWorld(World):
    """A world whose tasks take their time."""

    SECONDS: ClassVar[dict[Stage, float]] = {"text": 0.45, "denoise": 36.0, "vae": 0.5}

    def __post_init__(self) -> None:
        self.coming: list[tuple[float, int, Sim, Task]] = []  # when each task is done
        self.order = itertools.count()
        super().__post_init__()

    def work(self, sim: Sim, task: Task) -> None:
        heapq.heappush(self.coming, (self.now + self.SECONDS[sim.stage], next(self.order), sim, task))

    def round(self) -> None:
        super().round()
        while self.coming and self.coming[0][0] <= self.now:
            _, _, sim, task = heapq.heappop(self.coming)
            if sim.lent or sim.asked:  # it waits for what it lends
                heapq.heappush(self.coming, (self.now + TICK_SECONDS, next(self.order), sim, task))
            else:
                super().work(sim, task)


def workers(gpus: int) -> list[Sim]:
    """FLUX.1-dev's sizes on 16 GB cards."""
    denoise = WeightNeed(weights=23_800 * MB, least=1600 * MB, workspace=1200 * MB)
    text = WeightNeed(weights=9790 * MB, least=700 * MB, workspace=600 * MB)
    vae = WeightNeed(weights=170 * MB, least=170 * MB, workspace=3430 * MB)
    found = [Sim("denoise", denoise, 1000 * MB, 790 * MB, gpu=gpu) for gpu in range(gpus)]
    found += [Sim("text", text, 475 * MB, 790 * MB, gpu=gpu) for gpu in range(0, gpus, EACH)]
    return found + [Sim("vae", vae, 3000 * MB, 790 * MB, gpu=gpu) for gpu in range(EACH - 1, gpus, EACH)]


@click.command(help=__doc__.split("\n")[0])
@click.option("--gpus", default=1000, show_default=True)
@click.option("--jobs", default=4000, show_default=True, help="submitted at once")
@click.option("--rounds", default=2000, show_default=True, help="at most")
def main(gpus: int, jobs: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = SlowWorld(17_000 * MB + 3 * FIRST_HEADROOM, workers(gpus), Path(folder), gpus=gpus)
        took: list[float] = []
        decide = world.engine.leasing.decide

        def timed(*arguments, **more):  # type: ignore[no-untyped-def]
            begun = time.perf_counter()
            try:
                return decide(*arguments, **more)
            finally:
                took.append(time.perf_counter() - begun)

        world.engine.leasing.decide = timed  # type: ignore[method-assign]
        accepted = [job for _ in range(jobs // 500) for job in world.submit(500)]
        start = time.perf_counter()
        done = world.run(accepted, rounds)
        took.sort()
        print(json.dumps({
            "what": "decisions", "gpus": gpus, "workers": len(world.sims), "jobs": len(accepted),
            "done": sum(job.state == "done" for job in done), "decisions": len(took),
            "p50_s": round(statistics.median(took), 5), "p99_s": round(took[int(0.99 * len(took))], 5),
            "most_s": round(took[-1], 5), "jobs_per_s": round(len(accepted) / (time.perf_counter() - start)),
            "goal_p99_s": 0.005,
        }))  # fmt: skip


if __name__ == "__main__":
    main()

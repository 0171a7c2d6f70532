"""Measure what watching a job costs: denoising with previews asked for all the time, and jobs that nobody watches.

    python -m scripts.bench.previews /tmp/flux

On one GPU that holds everything, in a whole stack; prompts are known. Prints one JSON line a row: seconds of denoising,
previews a job, and whether all pictures are equal.
"""

import statistics
import time
from pathlib import Path

import click
import numpy as np

from protocol.client.client import Client
from protocol.job import ENDED
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row

GOAL = 0.005  # of a step
LOOKS = 0.05  # seconds between two looks


class PreviewBench(StackBench):
    def job(self, client: Client, watched: bool) -> tuple[float, set[int], bytes]:
        """Return the denoiser's seconds of a job, the steps that previews were of, and its picture."""
        job, steps = client.submit(PROMPT, seed=1, **self.recipe), set()
        while watched and (now := client.job(job.id)).state not in ENDED:
            if now.state == "denoise" and (preview := client.preview(job.id)).file:
                steps.add(preview.step)
            time.sleep(LOOKS)
        done = client.wait(job.id, 600)
        seconds = next(record.seconds for record in done.records if record.stage == "denoise")
        return seconds, steps, bytes(client.raw_pictures(job.id)[1].data)

    def compare(self, budget: int, times: int) -> None:
        with self.stack(budget) as client:
            for watched in (False, True, False):  # the first one teaches the map
                _, _, wanted = self.job(client, watched)
            alone: list[float] = []
            watching: list[float] = []
            previews, equal = [], True
            for _ in range(times):
                for watched in (False, True):
                    seconds, steps, picture = self.job(client, watched)
                    (watching if watched else alone).append(seconds)
                    equal = equal and picture == wanted
                    if watched:
                        previews.append(len(steps))
            cost = statistics.median(watching) / statistics.median(alone) - 1
            row(what="watched and not, in turns", alone_s=tuple(alone), watched_s=tuple(watching), cost=cost, goal=GOAL,
                previews=tuple(previews), equal=equal)  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--budget", default=40.0, show_default=True, help="GiB of the GPU")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--size", default=1024, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--times", default=6, show_default=True, help="jobs of each kind")
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
def main(model: Path, budget: float, device: str, size: int, steps: int, times: int, logs: Path | None) -> None:
    bench = PreviewBench(model, (0,), device.startswith("cuda"), size, steps, 0.0, np.zeros(0), logs)
    bench.compare(int(budget * GIB), times)


if __name__ == "__main__":
    main()

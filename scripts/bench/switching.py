"""Two models on one GPU that can't hold both: what a switch costs, and jobs of both in any order.

    python -m scripts.bench.switching /tmp/models --models z-image,klein-4b --cards 24,16

Real shapes, random weights. For each card: pictures of one model after the other, then of both in turns; twenty jobs in
turns and sorted by model; whether the first pictures come out the same after all that. Prints one JSON line a row.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from protocol.client.client import Client
from protocol.job import JobRequest
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row, watched
from scripts.bench.models import make
from scripts.bench.random_model import MODELS

ALONE, TURNS, MIXED = 4, 8, 20
LINK = 55e9  # bytes a second, as measured on H100s and H200s (PCIe 5 x16)
SWITCH_SECONDS, SWITCH_SHARE, MIXED_RATIO = 0.6, 1.02, 1.1  # goals


class SwitchBench(StackBench):
    """Stacks of several models on one GPU."""

    def __init__(
        self, folders: dict[str, Path], cuda: bool, size: int | None, steps: int | None, logs: Path | None
    ) -> None:
        first = next(iter(folders.values()))
        super().__init__(first, (0,), cuda, 0, 0, 0.0, np.zeros(0), logs)
        self.folders = folders
        self.recipes = {name: self._recipe(name, size, steps) for name in folders}

    @staticmethod
    def _recipe(name: str, size: int | None, steps: int | None) -> dict[str, Any]:
        model = MODELS[name]
        width, height = (size, size) if size else model.size
        return {"model": name, "width": width, "height": height, "steps": steps or model.steps, **model.request}

    def where(self, budget: int) -> list[str]:
        there = ["--gpus", "0"] if self.cuda else ["--device", "cpu:0", "--dtype", "bfloat16"]
        named = [part for name, folder in self.folders.items() for part in ("--model", f"{name}={folder}")]
        return [*named, *there, "--budget", f"0={budget}B"]

    def request(self, name: str, prompt: str = "", seed: int = 1) -> JobRequest:
        """Make a request, with a prompt that was never seen unless one is given."""
        self.prompts += 1
        return JobRequest(prompt=prompt or f"{PROMPT}, number {self.prompts}", seed=seed, **self.recipes[name])

    def timed(self, client: Client, name: str) -> float:
        start = time.perf_counter()
        client.wait(client.submit(self.request(name)).id, 300)
        return time.perf_counter() - start

    def pixels(self, client: Client, name: str) -> bytes:
        job = client.wait(client.submit(self.request(name, PROMPT)).id, 300)
        return bytes(client.raw_pictures(job.id)[1].data)

    def in_place(self, client: Client, name: str) -> int:
        """Bytes of a model's denoiser on the GPU."""
        (worker,) = [w for w in client.workers().workers if w.name == f"{name}-denoise-1"]
        return sum(component.device_bytes for component in worker.residency)

    def started(self, client: Client, name: str) -> None:
        """Seconds until the workers of a model that rests can take a task."""
        start = time.perf_counter()
        client.load_model(name)
        while sum(w.name.startswith(name) and w.state != "loading" for w in client.workers().workers) < 3:
            time.sleep(0.01)
        row(what=f"workers of {name} started", s=time.perf_counter() - start)

    def card(self, budget: int, prompt: str = PROMPT, count: int = MIXED) -> None:
        foreign, names = self.used(), list(self.folders)
        with watched(self.used) as most, self.stack(budget) as client:
            for name in names[1:]:
                self.started(client, name)
            first = {name: self.pixels(client, name) for name in names}
            alone, weights = {}, {}
            for name in names:
                self.timed(client, name)
                times = [self.timed(client, name) for _ in range(ALONE)]
                alone[name], weights[name] = statistics.median(times), self.in_place(client, name)
                row(what=f"{name} alone", s=alone[name], times=tuple(times), in_place_GB=weights[name] / 1e9)
            switches: dict[str, list[float]] = {name: [] for name in names}
            for number in range(TURNS):
                name = names[number % len(names)]
                switches[name].append(self.timed(client, name) - alone[name])
            for name, extra in switches.items():
                goal = SWITCH_SECONDS + SWITCH_SHARE * weights[name] / LINK
                row(what=f"switch to {name}", s=statistics.median(extra), times=tuple(extra), goal=goal,
                    ok=statistics.median(extra) <= goal)  # fmt: skip
            by_model, mixed = (self.all_of(client, order, count) for order in (names, None))
            row(what=f"{count} jobs in turns", s=mixed, by_model_s=by_model, ratio=mixed / by_model, goal=MIXED_RATIO,
                ok=mixed <= MIXED_RATIO * by_model)  # fmt: skip
            last = {name: self.pixels(client, name) for name in names}
            row(what=f"{budget / GIB:g} GiB", equal=first == last, driver_GB=(most[0] - foreign) / 1e9,
                budget_GB=budget / 1e9, ok=first == last and most[0] - foreign <= budget)  # fmt: skip

    def all_of(self, client: Client, order: list[str] | None, count: int) -> float:
        """Seconds of so many jobs that come at once, sorted by model in an `order`, or in turns."""
        names = list(self.folders)
        wanted = [names[number % len(names)] for number in range(count)]
        if order:
            wanted.sort(key=order.index)
        start = time.perf_counter()
        for job in client.submit_many([self.request(name) for name in wanted]):
            client.wait(job.id, 600)
        return time.perf_counter() - start


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--models", default="z-image,klein-4b", show_default=True)
@click.option("--cards", default="24,16", show_default=True, help="GiB each")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--size", type=int, help="of the pictures, in place of the models' usual size")
@click.option("--steps", type=int, help="in place of the models' usual number")
@click.option("--depth", type=int, help="layers at most, for a dry run")
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
def main(
    folder: Path,
    models: str,
    cards: str,
    device: str,
    size: int | None,
    steps: int | None,
    depth: int | None,
    logs: Path | None,
) -> None:
    folders = {name: folder / name for name in models.split(",")}
    for name, place in folders.items():
        if not place.exists():
            make(name, place, device, depth)
    bench = SwitchBench(folders, device.startswith("cuda"), size, steps, logs)
    for gib in cards.split(","):
        bench.card(int(float(gib) * GIB))


if __name__ == "__main__":
    main()

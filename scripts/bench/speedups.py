"""What the faster tiers bring on one GPU that holds everything, and what they cost in likeness to the exact picture.

    python -m scripts.bench.speedups /tmp/flux --pictures /tmp/pictures
    python -m scripts.bench.speedups workers/demo_model --size 256 --steps 20 --pictures /tmp/pictures
    python -m scripts.bench.speedups /tmp/sdxl --size 512 --steps 20 --variants "exact;batches of 4" --waiting 16

Each variant is a stack of its own: seconds until it is ready, of its first picture, of pictures with new prompts; its
likeness to the exact picture as PSNR, and both pictures beside each other. Of the exact one also the seconds from
`kill -9` of the denoise worker to its next step, some times. Prints one JSON line a row.
"""

import math
import statistics
import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

from protocol.client.client import Client
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row

FP8 = ("--quantize", "denoise=fp8-dynamic")
VARIANTS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "without CUDA graphs": ("--no-cuda-graphs",),
    "compiled": ("--compile",),
    "fp8": FP8,
    "fp8, compiled": (*FP8, "--compile"),
    "cached": ("--cache", "first-block:0.1"),
    "compiled, cached": ("--compile", "--cache", "first-block:0.1"),
    "fp8, compiled, cached": (*FP8, "--compile", "--cache", "first-block:0.1"),
    "batches of 4": ("--batch", "4"),
    "batches of 8": ("--batch", "8"),
}


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR of two uint8 pictures; infinity where they are equal."""
    error = float(np.mean((one.astype("float64") - other.astype("float64")) ** 2))
    return math.inf if not error else 10 * math.log10(255**2 / error)


class SpeedupBench(StackBench):
    """Stacks on one GPU that holds everything."""

    exact: np.ndarray | None = None

    def variant(self, name: str, budget: int, kills: int, waiting: int, pictures: Path | None) -> None:
        start = time.perf_counter()
        with self.stack(budget, *VARIANTS[name]) as client:
            ready = time.perf_counter() - start
            first, _ = self.one(client)
            self.one(client)
            times, stages = zip(*[self.one(client) for _ in range(5)], strict=True)
            made = self.made(client)
            exact = self.exact = made if self.exact is None else self.exact
            in_queue = min(self.queue(client, waiting)[0] for _ in range(2)) if waiting else 0.0
            row(what=name, ready_s=ready, first_s=first, s=statistics.median(times), times=times, stages=stages[-1],
                queue_s=in_queue, psnr=decibels(made, exact))  # fmt: skip
            if pictures:
                pictures.mkdir(parents=True, exist_ok=True)
                both = Image.fromarray(np.concatenate([exact, made], axis=1))
                both.save(pictures / f"{name.replace(', ', '-')}.png")
            for _ in range(kills if name == "exact" else 0):
                self.kill(client)

    def made(self, client: Client) -> np.ndarray:
        """Return the picture that is compared, uint8 (height, width, 3)."""
        request = self.new_request().model_copy(update={"prompt": PROMPT})
        job = client.submit(request)
        client.wait(job.id)
        _, tensor = client.raw_pictures(job.id)
        return np.array(np.frombuffer(tensor.data, "uint8").reshape(tensor.shape)[0])


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--variants", default=";".join(VARIANTS), show_default=True, help="separated by semicolons")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--budget", default=60.0, show_default=True, help="GiB of the GPU")
@click.option("--size", default=1024, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--kills", default=3, show_default=True)
@click.option("--waiting", default=0, show_default=True, help="jobs of a queue that is timed besides")
@click.option("--pictures", type=click.Path(path_type=Path), help="folder for pictures beside the exact one")
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
def main(
    folder: Path,
    variants: str,
    device: str,
    budget: float,
    size: int,
    steps: int,
    kills: int,
    waiting: int,
    pictures: Path | None,
    logs: Path | None,
) -> None:
    nothing = np.zeros(0)
    for name in variants.split(";"):
        if name not in VARIANTS:
            raise click.BadParameter(f"{name!r}; there are {', '.join(VARIANTS)}")
    kept: np.ndarray | None = None
    for name in variants.split(";"):
        of_it = logs / name.replace(", ", "-") if logs else None
        bench = SpeedupBench(folder, (0,), device.startswith("cuda"), size, steps, 0.0, nothing, of_it)
        bench.exact = kept
        try:
            bench.variant(name, int(budget * GIB), kills, waiting, pictures)
        except Exception as error:  # the other variants' rows are wanted all the same
            row(what=name, failed=f"{type(error).__name__}: {str(error)[:500]}")
        kept = bench.exact


if __name__ == "__main__":
    main()

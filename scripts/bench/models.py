"""Today's models at their real shapes, with random weights: plain diffusers beside stacks in parts of a GPU.

    python -m scripts.bench.models /tmp/models --only z-image,klein-4b --cards 24,16,12
    python -m scripts.bench.models /tmp/models --only flux --cards 16 --host-memory 32

For each model, in one run: everything resident in one process, diffusers' `enable_model_cpu_offload`, then whole stacks
held to each card's bytes: values that differ, single pictures with new prompts, a queue of them, most in use by the
driver, and what the plan says. Makes the models (7 to 58 GB of disk) and deletes them again unless told otherwise.
Prints one JSON line a row.
"""

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from diffusers import DiffusionPipeline

from scripts.bench.balloon import balloon
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row, watched
from scripts.bench.random_model import MODELS, RealModel

QUEUE, SINGLES = 8, 3


def plainly(
    folder: Path, model: RealModel, device: str, size: tuple[int, int], steps: int, offload: bool, result: Path
) -> None:
    """Time the plain pipeline with everything resident, and with its models on the GPU in turns; keep the picture."""
    cuda = device.startswith("cuda")
    start = time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to("cuda:0" if cuda else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    row(what="plain: loaded", s=time.perf_counter() - start)
    frames = {"num_frames": model.frames} if model.frames else {}

    def make() -> tuple[float, Any]:
        start = time.perf_counter()
        made = pipeline(
            prompt=PROMPT, width=size[0], height=size[1], num_inference_steps=steps, output_type="np",
            generator=torch.Generator("cpu").manual_seed(1), **frames, **model.options,
        )  # fmt: skip
        return time.perf_counter() - start, made[0]

    make()
    (seconds, picture), (again, _) = make(), make()
    seconds = min(seconds, again)
    row(what="plain: everything resident", s=seconds, driver_GB=peak(cuda))
    np.savez(result, picture=picture, seconds=seconds)
    if not offload:
        return
    pipeline.to("cpu")
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pipeline.enable_model_cpu_offload()
        make()
        offloaded, picture_too = make()
        equal = bool(np.array_equal(picture_too, picture))
        row(what="plain: enable_model_cpu_offload", s=offloaded, driver_GB=peak(cuda), equal=equal)


def peak(cuda: bool) -> float:
    return torch.cuda.max_memory_reserved() / 1e9 if cuda else 0.0


class ModelBench(StackBench):
    """Stacks of one model on one GPU."""

    def card(self, budget: int, prompt: str, count: int = QUEUE, singles: int = SINGLES) -> None:
        scale = ["--cfg-scale", str(self.recipe["cfg_scale"])] if "cfg_scale" in self.recipe else []
        planned = self.plan(budget, *scale)
        foreign = self.used()
        with watched(self.used) as most, self.stack(budget) as client:
            differing = self.differing(client, prompt)
            self.one(client)
            read = psutil.disk_io_counters()
            times, stages = zip(*[self.one(client) for _ in range(singles)], strict=True)
            whole, steady = self.queue(client, count)
            from_disk = (psutil.disk_io_counters().read_bytes - read.read_bytes) / (count + singles)
            differing += self.differing(client, prompt)  # after all that came and went
            row(
                what=f"{budget / GIB:g} GiB", single_s=min(times), of_plain=min(times) / self.plain, times=times,
                stages=stages[-1], queue_s=steady, queue_of_plain=steady / self.plain, with_filling_and_draining=whole,
                planned_single_s=planned["latency_seconds"], planned_s=planned["picture_seconds"],
                differing=differing, driver_GB=(most[0] - foreign) / 1e9, budget_GB=budget / 1e9,
                ok=most[0] - foreign <= budget, from_disk_GB_a_picture=from_disk / 1e9,
                host_free_GB=psutil.virtual_memory().available / 1e9, oom_kills=oom_kills(),
            )  # fmt: skip


def oom_kills() -> int:
    """Return how many processes the system has killed for want of memory since it started."""
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("oom_kill", 0))


def stacks(
    folder: Path,
    model: RealModel,
    device: str,
    size: tuple[int, int],
    steps: int,
    cards: list[float],
    result: Path,
    logs: Path | None,
    memory: float | None,
    count: int,
    singles: int,
) -> None:
    saved = np.load(result)
    cuda = device.startswith("cuda")
    bench = ModelBench(folder, (0,), cuda, size[0], steps, float(saved["seconds"]), saved["picture"], logs)
    bench.recipe.update(height=size[1], **model.request)
    if model.frames:
        bench.recipe["frames"] = model.frames
    for gib in cards:
        start = time.perf_counter()
        try:
            with balloon(int(memory * GIB)) if memory else contextlib.nullcontext():
                bench.card(int(gib * GIB), PROMPT, count, singles)
        except Exception as error:  # the other cards' rows are wanted all the same
            row(what=f"{gib:g} GiB", failed=f"{type(error).__name__}: {str(error)[:500]}")
        row(what=f"all of {gib:g} GiB", s=time.perf_counter() - start)


def make(name: str, folder: Path, device: str, depth: int | None) -> None:
    drawn = "cuda" if device.startswith("cuda") else "cpu"
    command = [sys.executable, "-m", "scripts.bench.random_model", name, str(folder), "--device", drawn]
    start = time.perf_counter()
    subprocess.run([*command, *(["--depth", str(depth)] if depth else [])], check=True, stdout=sys.stderr)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    row(what="model made", s=time.perf_counter() - start, GB=size / 1e9)


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--only", default=",".join(MODELS), show_default=True, help="the models")
@click.option("--cards", default="24,16,12", show_default=True, help="GiB each")
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--size", help="WxH in place of the model's usual size")
@click.option("--steps", type=int, help="in place of the model's usual number")
@click.option("--depth", type=int, help="layers at most, for a dry run")
@click.option("--keep", is_flag=True, help="don't delete the models, and use those that are there")
@click.option("--host-memory", type=float, help="GiB of the host's memory that are left to the stacks")
@click.option("--queue", "count", default=QUEUE, show_default=True, help="jobs in the queue")
@click.option("--singles", default=SINGLES, show_default=True, help="pictures one after the other")
@click.option("--offload/--no-offload", default=True, help="with diffusers' own offloading, too")
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
@click.option("--plain", "result", type=click.Path(path_type=Path), hidden=True)
def main(
    folder: Path,
    only: str,
    cards: str,
    device: str,
    size: str | None,
    steps: int | None,
    depth: int | None,
    keep: bool,
    host_memory: float | None,
    count: int,
    singles: int,
    offload: bool,
    logs: Path | None,
    result: Path | None,
) -> None:
    for name in only.split(","):
        model, place = MODELS[name], folder / name
        width, _, height = size.partition("x") if size else ("", "", "")
        pixels = (int(width), int(height or width)) if size else model.size
        if result:  # in a process of its own, so that its context leaves the GPU
            plainly(place, model, device, pixels, steps or model.steps, offload, result)
            return
        print(json.dumps({"model": name, "size": pixels, "steps": steps or model.steps}), flush=True)
        if not place.exists():
            make(name, place, device, depth)
        with tempfile.TemporaryDirectory() as kept:
            found = Path(kept, "plain.npz")
            subprocess.run(
                [sys.executable, "-m", "scripts.bench.models", *sys.argv[1:], "--only", name, "--plain", str(found)],
                check=True,
            )
            budgets = [float(gib) for gib in cards.split(",")]
            stacks(
                place,
                model,
                device,
                pixels,
                steps or model.steps,
                budgets,
                found,
                logs and logs / name,
                host_memory,
                count,
                singles,
            )
        if not keep:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()

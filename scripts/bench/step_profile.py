"""The time of a denoising step on a GPU, by kernels: products, attention, exchange between GPUs, the rest, and idling.

    python -m scripts.bench.step_profile /tmp/flux
    python -m scripts.bench.step_profile /tmp/flux --speedup denoise:compile
    python -m scripts.bench.step_profile /tmp/flux --speedup denoise:compile --speedup denoise:parallel=tensor-2

The denoise stage alone, everything resident, by torch's profiler; of several ranks the first one's. Milliseconds a
step, seconds a job without the profiler, and the kernels that take longest. Prints one JSON line a row.
"""

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # as workers do: a look whether there is a GPU would else bar forks

import click
import torch
from torch.profiler import ProfilerActivity, profile

from protocol.job import JobRequest, Recipe
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.speedups import canonical
from protocol.tensors import Tensor
from protocol.worker_spec import WorkerSpec
from scripts.bench.gpu import quiet
from scripts.bench.gpu_stacks import PROMPT, row
from workers.models.devices import Devices
from workers.models.loading import load
from workers.runtime.executor import StageRunner
from workers.runtime.ranks import follow, form
from workers.runtime.worker import Prepared, prepare, ranks_of
from workers.stages.text import TextStage

KINDS = {  # the first whose words are in a kernel's name
    "exchange": ("nccl",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "scaled_mm", "splitk"),
    "copies": ("memcpy", "memset"),
    "compiled, others": ("triton",),
}
LONGEST = 12  # kernels that are named


def embeddings(prepared: Prepared, recipe: Recipe, device: torch.device) -> tuple[Tensor, ...]:
    loaded = load(prepared.source, "text", Devices(device), torch.bfloat16)
    return tuple(TextStage(loaded, device).run(recipe, (), quiet).tensors)


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "others")


def covered(spans: list[tuple[float, float]]) -> float:
    """Return how long at least one of the spans was going on."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def measure(runner: StageRunner, recipe: Recipe, tensors: tuple[Tensor, ...], repeat: int) -> None:
    start = time.perf_counter()
    runner.run(recipe, tensors, quiet)
    row(what="first job", s=time.perf_counter() - start)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        runner.run(recipe, tensors, quiet)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    row(what="a job", s=seconds, ms_a_step=seconds / recipe.steps * 1e3, times=tuple(times))
    if not torch.cuda.is_available():
        return
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        runner.run(recipe, tensors, quiet)
        torch.cuda.synchronize()
    told(profiler, recipe.steps)


def told(profiler: Any, steps: int) -> None:
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        spans[kind_of(event.name)].append((event.time_range.start, event.time_range.end))
        times[event.name].append(event.time_range.elapsed_us())
    every = [span for of_kind in spans.values() for span in of_kind]
    busy, whole = covered(every), max(end for _, end in every) - min(start for start, _ in every)
    parts = {kind: covered(of_kind) / steps / 1e3 for kind, of_kind in sorted(spans.items())}
    row(what="ms a step, by kind", **parts, busy=busy / steps / 1e3, idle=(whole - busy) / steps / 1e3)
    for name in sorted(times, key=lambda name: -sum(times[name]))[:LONGEST]:
        row(kernel=name[:120], kind=kind_of(name), ms_a_step=sum(times[name]) / steps / 1e3,
            times_a_step=len(times[name]) / steps, us=statistics.median(times[name]))  # fmt: skip


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--speedup", "speedups", multiple=True, help="as stacks write them, such as denoise:compile")
@click.option("--device", default="cuda", show_default=True)
@click.option("--size", default=1024, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--repeat", default=3, show_default=True)
def main(model: Path, speedups: tuple[str, ...], device: str, size: int, steps: int, repeat: int) -> None:
    spec = WorkerSpec(
        stage="denoise", name="denoise", model=ModelSpec(name=str(model)), device=device, dtype="bfloat16",
        speedups=canonical(speedups),
    )  # fmt: skip
    ranks = ranks_of(spec)  # where torchao is installed, its import brings up CUDA, and none can be forked
    if ranks == 1 and device == "cuda":
        spec = spec.model_copy(update={"device": "cuda:0"})
    group = form(ranks, spec.name) if ranks > 1 else None
    prepared = prepare(spec)
    prepared.group = group
    if group and group.rank:
        follow(lambda: prepared.denoise_stage(*prepared.weights()), prepared.gpu_leases, group)
    if group:
        group.watch()
    request = JobRequest(prompt=PROMPT, width=size, height=size, steps=steps, seed=1)
    recipe = resolve(request, prepared.description, "bfloat16", None)
    row(what="kernels", speedups=canonical(speedups), size=size, steps=recipe.steps)
    runner, _ = prepared.load()
    tensors = embeddings(prepared, recipe, torch.device("cuda:0" if device == "cuda" else device))
    measure(runner, recipe, tensors, repeat)
    os._exit(0)  # other ranks end with this one


if __name__ == "__main__":
    main()

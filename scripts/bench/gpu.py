"""Measure what a GPU's memory costs in time, side by side with diffusers in one run, with the limits beside each row.

    python -m scripts.bench.random_model flux /tmp/flux
    python -m scripts.bench.gpu /tmp/flux
    python -m scripts.bench.gpu /tmp/flux --gpus 2        # every placement on two cards of 16 GiB

First single stages, in a process of their own, then whole stacks. Smaller cards are imitated on a large one: what
allocates is capped, and the driver's count of all memory in use, contexts included, is watched all the time. Prints one
JSON line a row.

Longer than other files: one row beside the other, with the same limits.
"""

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import FluxPipeline
from torch.utils.flop_counter import FlopCounterMode

from protocol.job import JobRequest, Recipe
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.tensors import Tensor
from scripts.bench.gpu_placements import ROWS, on_several, reference_recipe
from scripts.bench.gpu_stacks import GIB, PROMPT, StackBench, row, watched
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, locate
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage
from workers.tensors import from_wire
from workers.weights.residency import Residency

MARGIN = 300_000_000  # bytes of the allocator's rounding


def quiet(step: int, steps: int, saved: object = None) -> None:
    pass


class Driver:
    """Memory in use on a GPU by the driver's account, all processes and contexts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def used(self) -> int:
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


class Bench:
    def __init__(self, model: str, device: torch.device, size: int, steps: int) -> None:
        self.device, self.driver = device, Driver(device)
        self.source: Source = locate(ModelSpec(name=model), "denoise")
        self.dtype = torch.bfloat16
        request = JobRequest(prompt=PROMPT, width=size, height=size, steps=steps, seed=1)
        self.recipe: Recipe = resolve(request, describe(self.source), "bfloat16", None)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
        """Median seconds of `times` runs, and what the last one gave."""
        seconds = []
        for _ in range(times):
            self.sync()
            start = time.perf_counter()
            result = work()
            self.sync()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds), result

    def stage(self, name: Any) -> Any:
        loaded = load(self.source, name, Devices(self.device, leased=True), self.dtype)
        for residency in loaded.residencies.values():
            residency.swap_in(residency.total_bytes)
        return {"text": TextStage, "denoise": DenoiseStage, "vae": VaeStage}[name](loaded, self.device)

    def link(self) -> float:
        """Bytes a second from page-locked memory."""
        on_gpu = self.device.type == "cuda"
        size = 4 * GIB if on_gpu else 1 << 26
        seconds = self.copying(torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu))
        row(what="link, page-locked", GBps=size / seconds / 1e9)
        self.release()
        return size / seconds

    def copying(self, source: torch.Tensor) -> float:
        place = torch.empty_like(source, device=self.device)
        return self.timed(lambda: place.copy_(source, non_blocking=True), 5)[0]

    def matmul(self) -> float:
        """FLOP a second of a large product in the model's dtype, as a GPU keeps it up for seconds."""
        on_gpu = self.device.type == "cuda"
        size = 8192 if on_gpu else 512
        one, other = (torch.randn(size, size, dtype=self.dtype, device=self.device) for _ in range(2))

        def rate(products: int) -> float:
            def work() -> None:
                for _ in range(products):
                    one @ other

            return products * 2 * size**3 / self.timed(work)[0]

        rate(3)
        burst, sustained = rate(20), rate(2000 if on_gpu else 20)
        row(what="matrix product", burst_TFLOPs=burst / 1e12, sustained_TFLOPs=sustained / 1e12)
        return sustained

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def plain(self, matmul: float) -> float:
        """The whole picture by FluxPipeline in one process, everything resident, prompt not cached; its seconds."""
        pipeline = FluxPipeline.from_pretrained(self.source.folder, dtype=self.dtype).to(self.device)
        pipeline.set_progress_bar_config(disable=True)

        def make() -> Any:
            return pipeline(
                PROMPT, height=self.recipe.height, width=self.recipe.width, num_inference_steps=self.recipe.steps,
                guidance_scale=self.recipe.guidance, generator=torch.Generator("cpu").manual_seed(1), output_type="np",
            ).images  # fmt: skip

        make()
        seconds, self.picture = self.timed(make, 2)
        with FlopCounterMode(display=False) as counter:
            make()
        self.flops = counter.get_total_flops()
        row(what="diffusers: whole picture, everything resident", s=seconds, limit_s=self.flops / matmul)
        return seconds

    def embeddings(self, text: TextStage) -> tuple[Tensor, ...]:
        return tuple(text.run(self.recipe, (), quiet).tensors)

    def swaps(self, residency: Residency, link: float) -> None:
        """Time swaps. Drivers clear memory in the background once it is let go, with the GPU's copy engines, too."""
        out: list[float] = []
        for pause, where in ((0.5, "free for half a second"), (0.0, "let go just now")):
            into = []
            for _ in range(3):
                out.append(self.timed(residency.swap_out)[0])
                time.sleep(pause)
                into.append(self.timed(lambda: residency.swap_in(residency.total_bytes))[0])
            rate = residency.total_bytes / min(into)
            row(what=f"swap-in of the denoiser, to memory {where}", s=min(into), limit_s=residency.total_bytes / link,
                GBps=rate / 1e9, of_link=rate / link, goal=0.95)  # fmt: skip
        row(what="swap-out of the denoiser", s=max(out), goal_s=0.03)

    def cards(
        self, stage: DenoiseStage, embeddings: tuple[Tensor, ...], link: float, sizes: list[float], **limits: float
    ) -> None:
        """The denoiser alone on smaller and smaller cards."""
        residency = next(iter(stage.residencies))

        def denoise() -> bytes:
            return b"".join(tensor.data for tensor in stage.run(self.recipe, embeddings, quiet).tensors)

        denoise()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        resident, wanted = self.timed(denoise, 3)
        kind = "compiled" if residency.compiled else "exact"
        row(what=f"denoise, {kind}, resident", s=resident, driver_bytes=self.driver.used(), **limits)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        workspace = peak - residency.device_bytes
        residency.swap_out()
        context = self.driver.used()  # of this process, nothing else being on its GPU
        row(what="workspace and context", workspace_bytes=workspace, context_bytes=context)
        for gib in sizes:
            card = int(gib * GIB)
            total = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else card
            if self.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction((card - context) / total, self.device)
            budget = card - context - workspace - MARGIN if self.device.type == "cuda" else card
            with watched(self.driver.used) as used:
                residency.swap_in(budget)
                first = self.timed(denoise)[0]
                seconds, got = self.timed(denoise, 3)
            plan = residency.plan
            streamed = plan.streamed_bytes if plan else 0
            row(what=f"denoise, {kind}, {gib:g} GiB card", s=seconds, times_resident=seconds / resident, first_s=first,
                driver_bytes=used[0], card_bytes=card, streamed_GB_a_step=streamed / 1e9,
                link_limit_s=streamed * self.recipe.steps / link, state=residency.state,
                equal=got == wanted)  # fmt: skip
            residency.swap_out()
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def turns(self, text: TextStage, stage: DenoiseStage, vae: VaeStage) -> None:
        """Text encoders and denoiser taking turns on one GPU, the VAE in."""

        def swap(stages: Any, inside: bool) -> None:
            for residency in stages.residencies:
                residency.swap_in(residency.total_bytes) if inside else residency.swap_out()

        def picture() -> Tensor:
            swap(text, True)
            embeddings = self.embeddings(text)
            swap(text, False)
            swap(stage, True)
            latents = stage.run(self.recipe, embeddings, quiet).tensors
            pictures = vae.run(self.recipe, tuple(latents), quiet).tensors[0]
            swap(stage, False)
            return pictures

        seconds, got = self.timed(picture, 2)
        equal = torch.equal(from_wire(got), torch.from_numpy((self.picture * 255).round().astype("uint8")))
        row(what="whole picture, text and denoiser taking turns", s=seconds, goal_s=5.8, equal=equal)

    def save(self, path: Path, seconds: float) -> None:
        """Save the picture and its seconds for the stack's rows, which come from another process."""
        np.savez(path, picture=self.picture, seconds=seconds)


def single_stages(model: Path, device: str, size: int, steps: int, cards: list[float], result: Path) -> None:
    bench = Bench(str(model), torch.device(device), size, steps)
    link, matmul = bench.link(), bench.matmul()
    bench.save(result, bench.plain(matmul))
    bench.release()  # the plain pipeline's 34 GB
    text, denoise, vae = (bench.stage(name) for name in ("text", "denoise", "vae"))
    embeddings = bench.embeddings(text)
    for residency in text.residencies:
        residency.swap_out()
    transformer = denoise.residencies[0]
    bench.swaps(transformer, link)
    bench.turns(text, denoise, vae)
    for residency in vae.residencies:
        residency.swap_out()
    transformer.swap_in(transformer.total_bytes)
    limit = bench.flops / matmul
    bench.cards(denoise, embeddings, link, cards, limit_s=limit)
    transformer.compile()
    transformer.swap_in(transformer.total_bytes)
    start = time.perf_counter()
    denoise.run(bench.recipe, embeddings, quiet)
    row(what="denoise, compiled, first run", s=time.perf_counter() - start)
    bench.cards(denoise, embeddings, link, cards[:1], limit_s=limit, goal_s=3.5)


def stacks(
    model: Path, device: str, size: int, steps: int, budgets: list[int], result: Path, logs: Path | None
) -> None:
    saved, cuda = np.load(result), device.startswith("cuda")
    gpu = int(device.partition(":")[2] or 0)
    bench = StackBench(model, (gpu,), cuda, size, steps, float(saved["seconds"]), saved["picture"], logs)
    everything, both, card = budgets
    bench.resident(everything, PROMPT)
    bench.turns(both, PROMPT)
    bench.card(card, PROMPT)


def again(part: str, result: Path) -> None:
    """Run a part of this in a process of its own, with the same arguments."""
    command = [sys.executable, "-m", "scripts.bench.gpu", *sys.argv[1:], "--part", part, "--result", str(result)]
    subprocess.run(command, check=True)


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--size", default=1024, show_default=True)
@click.option("--steps", default=28, show_default=True)
@click.option("--cards", default="16,12,8", show_default=True, help="GiB each, the first one for compiled rows, too")
@click.option(
    "--budgets", default="60,28,16", show_default=True,
    help="GiB of stacks with room for all, not for text and denoiser together, and of a small card",
)  # fmt: skip
@click.option("--gpus", "count", default=1, show_default=True, help="2 or more: rows of stacks on so many, see --rows")
@click.option("--rows", default=",".join(ROWS), show_default=True, help="of --gpus 2 and more: which")
@click.option("--queue", "each", default=12, show_default=True, help="of --gpus 2 and more: jobs for each GPU")
@click.option("--part", type=click.Choice(["all", "stages", "stacks", "recipe"]), default="all", show_default=True)
@click.option("--logs", type=click.Path(path_type=Path), help="folder to keep the stacks' logs in")
@click.option("--result", type=click.Path(path_type=Path), hidden=True)
def main(
    model: Path,
    device: str,
    size: int,
    steps: int,
    cards: str,
    budgets: str,
    count: int,
    rows: str,
    each: int,
    part: str,
    logs: Path | None,
    result: Path | None,
) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = result or Path(folder, "plain.npz")
        if part == "recipe":
            reference_recipe(model, device, size, steps, int(float(cards.split(",")[0]) * GIB), result)
            return
        if count > 1:
            if not result.exists():
                again("recipe", result)
            budget = int(float(cards.split(",")[0]) * GIB)
            on_several(model, device, count, size, steps, budget, result, logs, rows.split(","), each)
            return
        if part == "stages":
            single_stages(model, device, size, steps, [float(gib) for gib in cards.split(",")], result)
        elif part == "all":  # in a process of its own, so that its context leaves the GPU
            again("stages", result)
        if part != "stages":
            stacks(model, device, size, steps, [int(float(gib) * GIB) for gib in budgets.split(",")], result, logs)
    row(what=part, s=time.perf_counter() - start)


if __name__ == "__main__":
    main()

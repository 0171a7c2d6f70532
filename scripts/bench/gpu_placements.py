"""Rows of bench_gpu.py --gpus 2: every placement on several GPUs that are held to a small card's memory each.

Beside them, in the same run, the recipe that diffusers' documentation gives for two small cards: encode, let go, load
the denoiser spread over both, denoise, let go, load the VAE, decode.
"""

import gc
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from orchestrator.gpu_driver import used_bytes
from protocol.client.client import Client
from scripts.bench.gpu_stacks import PROMPT, StackBench, row, watched

GUIDANCE = 3.5
ROWS = ("replicas", "compiled", "latency", "tensor", "context", "split")
WARM = 3  # jobs for each denoiser before anything is timed
QUEUE = 12  # jobs for each GPU


def reference_recipe(model: Path, device: str, size: int, steps: int, card: int, result: Path) -> None:
    """Time the recipe, twice, and the same picture by one process on one GPU, whose pixels and seconds are kept."""
    cuda = device.startswith("cuda")
    options: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": GUIDANCE}

    def generator() -> torch.Generator:
        return torch.Generator("cpu").manual_seed(1)

    def release() -> None:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()

    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to("cuda:0" if cuda else "cpu")
    pipeline.set_progress_bar_config(disable=True)

    def plain() -> Any:
        return pipeline(PROMPT, generator=generator(), output_type="np", **options).images  # noqa: F821

    plain()
    start = time.perf_counter()
    picture = plain()
    seconds = time.perf_counter() - start
    row(what="diffusers: whole picture, one process, one large GPU", s=seconds)
    np.savez(result, picture=picture, seconds=seconds)
    del pipeline  # its 34 GB
    release()
    for turn in ("first", "page cache warm"):
        marks = [time.perf_counter()]
        pictures = recipe(model, cuda, card, options, generator, release, marks)
        parts = [after - before for before, after in itertools.pairwise(marks)]
        row(what=f"reference recipe, script by script, {turn}", s=marks[-1] - marks[0],
            encode_load_denoise_decode_s=tuple(parts), equal=bool(np.array_equal(pictures, picture)))  # fmt: skip


@torch.no_grad()
def recipe(
    model: Path, cuda: bool, card: int, options: dict[str, Any], generator: Any, release: Any, marks: list[float]
) -> Any:
    """Run the recipe, and return its picture; `marks` gets the moments when its parts are done."""
    text = FluxPipeline.from_pretrained(model, transformer=None, vae=None, dtype=torch.bfloat16)
    text.to("cuda:0" if cuda else "cpu")
    embeds, pooled, _ = text.encode_prompt(PROMPT, None)
    del text
    release()
    marks.append(time.perf_counter())
    spread = {"device_map": "auto", "max_memory": dict.fromkeys(range(2), card - 2000000000)} if cuda else {}
    transformer = FluxTransformer2DModel.from_pretrained(model / "transformer", dtype=torch.bfloat16, **spread)
    marks.append(time.perf_counter())
    denoiser = FluxPipeline.from_pretrained(
        model, transformer=transformer, vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, dtype=torch.bfloat16,
    )  # fmt: skip
    denoiser.set_progress_bar_config(disable=True)
    factor = denoiser.vae_scale_factor
    latents = denoiser(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=generator(), output_type="latent", **options
    ).images
    marks.append(time.perf_counter())
    del denoiser, transformer
    release()
    vae = AutoencoderKL.from_pretrained(model / "vae", dtype=torch.bfloat16).to("cuda:0" if cuda else "cpu")
    whole = FluxPipeline.from_pretrained(
        model, transformer=None, vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None
    )
    latents = latents.to(vae.device)
    unpacked = whole._unpack_latents(latents, options["height"], options["width"], factor)
    decoded = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    pictures = whole.image_processor.postprocess(decoded, output_type="np")
    marks.append(time.perf_counter())
    del vae, whole, decoded
    release()
    return pictures


class SeveralBench(StackBench):
    """Stacks on several GPUs, each of which gives `budget` bytes."""

    budget = 0

    def run(self, what: str, measure: Callable[[Client, dict[str, Any]], None], *arguments: str) -> None:
        """A stack, its plan beside it, and the most that each GPU had in use by the driver."""
        planned = self.plan(self.budget, *arguments)
        row(what=f"{what}: plan", why=planned["why"], picture_s=planned["picture_seconds"],
            latency_s=planned["latency_seconds"])  # fmt: skip
        peaks = [watched(self._of(gpu)) for gpu in self.gpus]
        foreign = [self._of(gpu)() for gpu in self.gpus]
        entered = [peak.__enter__() for peak in peaks]
        try:
            with self.stack(self.budget, *arguments) as client:
                self.warm(client)
                measure(client, planned)
        finally:
            for peak in peaks:
                peak.__exit__(None, None, None)
        used = tuple(peak[0] - before for peak, before in zip(entered, foreign, strict=True))
        row(what=f"{what}: most in use by the driver", bytes=used, goal=self.budget,
            ok=all(size <= self.budget for size in used))  # fmt: skip

    def _of(self, gpu: int) -> Callable[[], int]:
        return lambda: (used_bytes(gpu) or 0) if self.cuda else 0

    def warm(self, client: Client) -> None:
        denoisers = sum(worker.stage == "denoise" for worker in client.workers().workers)
        for job in client.submit_many([self.new_request() for _ in range(WARM * denoisers)]):
            client.wait(job.id, 300)

    # -- rows -----------------------------------------------------------------------------------

    def steady(self, what: str, goal: float, exact: bool) -> Callable[[Client, dict[str, Any]], None]:
        def measure(client: Client, planned: dict[str, Any]) -> None:
            whole, seconds = self.queue(client, QUEUE * len(self.gpus))
            share = planned["picture_seconds"] / seconds
            row(what=f"{what}: seconds a picture in steady state", s=seconds, with_filling_and_draining=whole,
                of_half_of_one_process=seconds * len(self.gpus) / self.plain, goal=goal, predicted=share,
                differing=self.differing(client, PROMPT) if exact else None)  # fmt: skip
            if exact:
                self.kills(client)

        return measure

    def alone(self, what: str, goal: float, exact: bool) -> Callable[[Client, dict[str, Any]], None]:
        def measure(client: Client, planned: dict[str, Any]) -> None:
            times, stages = zip(*[self.one(client) for _ in range(5)], strict=True)
            seconds = statistics.median(times)
            row(what=f"{what}: a single job with a new prompt", s=seconds, times=times, stages=stages, goal=goal,
                predicted=planned["latency_seconds"] / seconds, differing=self.differing(client, PROMPT),
                exact=exact)  # fmt: skip

        return measure

    def split(self, client: Client, planned: dict[str, Any]) -> None:
        singly = [self.queue(client, 1, same=True)[0] for _ in range(3)]
        _, together = self.queue(client, QUEUE * len(self.gpus), same=True)
        one = statistics.median(singly)
        row(what="split: two jobs in flight against one, prompts known", one_s=one, s_a_picture=together,
            times=one / together, goal=1.9, predicted=planned["picture_seconds"] / together,
            differing=self.differing(client, PROMPT))  # fmt: skip

    def kills(self, client: Client) -> None:
        """The text worker and a denoise worker, in mid-run: nothing is lost, and others go on."""
        jobs = client.submit_many([self.new_request(seed) for seed in range(2 * len(self.gpus) + 2)])
        killed: dict[str, str] = {}
        for event in client.events([job.id for job in jobs], timeout=300):
            if event.state != "denoise" or not event.running or event.step < 2 or len(killed) == 2:
                continue
            stage = "denoise" if "text" in killed else "text"
            workers = [w for w in client.workers().workers if w.stage == stage]
            victim = next((w for w in workers if stage == "text" or w.job == event.job), None)
            if victim:
                killed[stage] = victim.job or ""
                psutil.Process(victim.pid).kill()
                if stage == "text":
                    client.submit_many([self.new_request()])
        done = [client.wait(job.id, 300) for job in jobs]
        disturbed = [job.id for job in done if job.reasons and job.id not in killed.values()]
        row(what="text worker and a denoise worker killed in mid-run", jobs=len(done),
            lost=sum(job.state != "done" for job in done), others_disturbed=len(disturbed))  # fmt: skip


def on_several(
    model: Path, device: str, count: int, size: int, steps: int, budget: int, result: Path, logs: Path | None,
    rows: list[str],
) -> None:  # fmt: skip
    saved = np.load(result)
    cuda = device.startswith("cuda")
    bench = SeveralBench(model, tuple(range(count)), cuda, size, steps, float(saved["seconds"]), saved["picture"], logs)
    bench.budget = budget
    for name in rows:
        start = time.perf_counter()
        match name:
            case "replicas":
                bench.run("replicas", bench.steady("replicas", 2.6, True), "--placement", "replicas")
            case "compiled":
                measure = bench.steady("replicas, compiled", 2.0, False)
                bench.run("replicas, compiled", measure, "--placement", "replicas", "--compile")
            case "latency":
                bench.run("latency", bench.alone("best exact placement", 5.5, True), "--optimize", "latency")
            case "tensor" | "context":
                compiled = ["--compile"] if cuda else []
                measure = bench.alone(f"{name} parallel, compiled", 2.9, False)
                bench.run(name, measure, "--placement", name, *compiled)
            case "split":
                bench.run("split", bench.split, "--placement", "split")
        row(what=f"all of {name}", s=time.perf_counter() - start)
    assert threading.active_count() == 1

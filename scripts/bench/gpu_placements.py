"""Rows of `scripts.bench.gpu --gpus 2` and more: every placement on GPUs that are held to a small card's memory each.

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
ROWS = ("replicas", "compiled", "latency", "tensor", "context", "split", "links", "pairs", "models")
WARM = 3  # jobs for each denoiser before anything is timed
FORK_SERVER = "workers.runtime.fork_server"


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


def links(gpus: tuple[int, ...], cuda: bool, seconds: float = 3.0, size: int = 1 << 29) -> None:
    """Bytes a second that each GPU copies from page-locked memory: alone, and all at once."""
    devices = [torch.device("cuda", gpu) if cuda else torch.device("cpu") for gpu in gpus]
    sources = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda).fill_(1) for _ in devices]
    places = [torch.empty(size, dtype=torch.uint8, device=device) for device in devices]

    def copied(number: int, rates: list[float]) -> None:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            places[number].copy_(sources[number], non_blocking=True)
            if cuda:
                torch.cuda.synchronize(devices[number])
            count += 1
        rates[number] = count * size / (time.perf_counter() - start) / 1e9

    alone, together = [0.0] * len(gpus), [0.0] * len(gpus)
    for number in range(len(gpus)):
        copied(number, alone)
    threads = [threading.Thread(target=copied, args=(number, together)) for number in range(len(gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    row(what="links from page-locked memory", alone_GBps=tuple(alone), together_GBps=tuple(together),
        of_alone=sum(together) / sum(alone))  # fmt: skip


def command_of(process: psutil.Process) -> list[str]:
    """Return a process's command; nothing of one that has ended."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


class SeveralBench(StackBench):
    """Stacks on several GPUs, each of which gives `budget` bytes."""

    budget, each = 0, 12  # jobs for each GPU in a queue

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

    @property
    def ideal(self) -> float:
        """Seconds a picture if so many GPUs did as many pictures at once as one process on one of them does alone."""
        return self.plain / len(self.gpus)

    # -- rows -----------------------------------------------------------------------------------

    def steady(self, what: str, exact: bool) -> Callable[[Client, dict[str, Any]], None]:
        def measure(client: Client, planned: dict[str, Any]) -> None:
            whole, seconds = self.queue(client, self.each * len(self.gpus))
            share = planned["picture_seconds"] / seconds
            row(what=f"{what}: seconds a picture in steady state", s=seconds, with_filling_and_draining=whole,
                of_its_part_of_one_process=seconds / self.ideal, goal=1.05, predicted=share,
                differing=self.differing(client, PROMPT) if exact else None)  # fmt: skip
            if exact:
                self.kills(client)
                row(what="after the kills", differing=self.differing(client, PROMPT))

        return measure

    def alone(self, what: str, goal: float | None, exact: bool) -> Callable[[Client, dict[str, Any]], None]:
        def measure(client: Client, planned: dict[str, Any]) -> None:
            times, stages = zip(*[self.one(client) for _ in range(5)], strict=True)
            seconds = statistics.median(times)
            row(what=f"{what}: a single job with a new prompt", s=seconds, times=times, stages=stages, goal=goal,
                predicted=planned["latency_seconds"] / seconds, differing=self.differing(client, PROMPT),
                exact=exact)  # fmt: skip
            if not exact:
                self.kill_rank(client)

        return measure

    def kill_rank(self, client: Client) -> None:
        """One of the processes that compute together, in mid-run: its job is done again, with the same bits."""
        request = self.new_request()
        first, again = (client.wait(client.submit(request).id, 300) for _ in range(2))
        undisturbed = client.raw_pictures(again.id)[1].data == client.raw_pictures(first.id)[1].data
        job = client.submit(request)  # the same picture again
        start = 0.0
        for event in client.events([job.id], timeout=300):
            if event.state == "denoise" and event.running and event.step >= 2 and not start:
                victim = next(w for w in client.workers().workers if w.job == job.id)
                ranks = [p for p in psutil.Process(victim.pid).children() if FORK_SERVER in command_of(p)]
                ranks[-1].kill()  # others of its children compile
                start = time.perf_counter()
        done = client.wait(job.id, 300)
        row(what="one rank killed in mid-run", state=done.state, reasons=len(done.reasons),
            equal_undisturbed=undisturbed, s=time.perf_counter() - start,
            equal=client.raw_pictures(job.id)[1].data == client.raw_pictures(first.id)[1].data)  # fmt: skip

    def split(self, client: Client, planned: dict[str, Any]) -> None:
        singly = [self.queue(client, 1, same=True)[0] for _ in range(3)]
        _, together = self.queue(client, self.each * len(self.gpus), same=True)
        one = statistics.median(singly)
        count = len(self.gpus)
        row(what=f"split: {count} jobs in flight against one, prompts known", one_s=one, s_a_picture=together,
            times=one / together, goal={2: 1.9, 4: 3.6}.get(count), predicted=planned["picture_seconds"] / together,
            differing=self.differing(client, PROMPT))  # fmt: skip

    def kills(self, client: Client) -> None:
        """The text worker, the denoise worker of each GPU and the fork server: nothing is lost, and others go on."""
        jobs = client.submit_many([self.new_request(seed) for seed in range(3 * len(self.gpus) + 4)])
        todo: list[str | int] = ["text", *self.gpus, "fork server"]
        killed: dict[str | int, str] = {}
        for event in client.events([job.id for job in jobs], timeout=300):
            if event.state != "denoise" or not event.running or event.step < 2 or not todo:
                continue
            next_one, workers = todo[0], client.workers().workers
            if next_one == "fork server":
                forked = [p for p in psutil.Process().children(recursive=True) if FORK_SERVER in command_of(p)]
                min(forked, key=psutil.Process.create_time).kill()  # all that it forks are called as it is
                todo.pop(0)
                continue
            mine = [w for w in workers if w.stage == ("text" if next_one == "text" else "denoise")]
            if next_one != "text":
                mine = [w for w in mine if next_one in w.gpus and w.job]
            if mine:
                killed[next_one] = mine[0].job or ""
                psutil.Process(mine[0].pid).kill()
                todo.pop(0)
        done = [client.wait(job.id, 300) for job in jobs]
        disturbed = [job.id for job in done if job.reasons and job.id not in killed.values()]
        row(what="killed in mid-run, one after the other: text, the denoise worker of each GPU, the fork server",
            jobs=len(done), not_killed=tuple(map(str, todo)), lost=sum(job.state != "done" for job in done),
            others_disturbed=len(disturbed))  # fmt: skip

    def two_models(self, client: Client, planned: dict[str, Any]) -> None:
        """A queue whose jobs alternate between two models of the same shapes."""
        names = [model.name for model in client.models()]
        requests = [
            self.new_request(seed).model_copy(update={"model": names[seed % len(names)]})
            for seed in range(self.each * len(self.gpus))
        ]
        start = time.perf_counter()
        jobs = [client.wait(job.id, 300) for job in client.submit_many(requests)]
        row(what="replicas, two models, jobs alternating", models=len(names), jobs=len(jobs),
            s_a_picture=(time.perf_counter() - start) / len(jobs),
            lost=sum(job.state != "done" for job in jobs), differing=self.differing(client, PROMPT))  # fmt: skip
        self.kills(client)


def on_several(
    model: Path, device: str, count: int, size: int, steps: int, budget: int, result: Path, logs: Path | None,
    rows: list[str], each: int,
) -> None:  # fmt: skip
    saved = np.load(result)
    cuda = device.startswith("cuda")
    bench = SeveralBench(model, tuple(range(count)), cuda, size, steps, float(saved["seconds"]), saved["picture"], logs)
    bench.budget, bench.each = budget, each
    compiled = ["--compile"] if cuda else []
    for name in rows:
        start = time.perf_counter()
        match name:
            case "replicas":
                bench.run("replicas", bench.steady("replicas", True), "--placement", "replicas")
            case "compiled":
                measure = bench.steady("replicas, compiled", False)
                bench.run("replicas, compiled", measure, "--placement", "replicas", "--compile")
            case "latency":
                goal = 1.03 * bench.plain
                bench.run("latency", bench.alone("best exact placement", goal, True), "--optimize", "latency")
            case "tensor" | "context":
                measure = bench.alone(f"{name} parallel, compiled", 2.6 if count == 2 else None, False)
                bench.run(name, measure, "--placement", name, "--workers", "denoise=1", *compiled)
            case "split":
                bench.run("split", bench.split, "--placement", "split", "--workers", "denoise=1")
            case "pairs":
                measure = bench.steady("two tensor parallel denoisers, compiled", False)
                pairs = ["--placement", "tensor", "--workers", "denoise=2", *compiled]
                bench.run("pairs", measure, *pairs)
            case "models":
                bench.run("two models", bench.two_models, "--placement", "replicas", "--model", f"second={model}")
            case "links":
                links(bench.gpus, cuda)
        row(what=f"all of {name}", s=time.perf_counter() - start)
    assert threading.active_count() == 1

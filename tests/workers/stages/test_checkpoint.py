"""A job that another worker goes on with, from any step, gives the same bits: any family, any scheduler."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve
from protocol.tensors import Tensor
from tests import tiny, tiny_videos
from tests.pictures import as_task, noise
from tests.records import before_denoising, decodes_of
from tests.tiny import needs_gpus
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.stages.checkpoint import Unstorable, check_storable, freeze, thaw
from workers.stages.contract import Saved
from workers.stages.denoise import DenoiseStage

CPU = torch.device("cpu")
STEPS = 5
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
NOISE = [
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDIMScheduler", "PNDMScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
]  # fmt: skip


def denoiser(source: Source, seconds: float | None = 0.0, budget: int = 0, device: torch.device = CPU) -> DenoiseStage:
    devices = Devices(device, {0: budget} if budget else {})
    return DenoiseStage(load(source, "denoise", devices, torch.float32), device, seconds)


def prepared(pipeline: DiffusionPipeline, folder: Path, **fields: Any) -> tuple[Source, Recipe, tuple[Tensor, ...]]:
    tiny.save(pipeline, folder)
    source = read(str(folder), folder, None)
    model = describe(source)
    request = JobRequest(prompt="a star", steps=STEPS, seed=3, width=tiny.SIZE, height=tiny.SIZE, **fields)
    recipe = resolve(request, model, "float32", None)
    return source, recipe, before_denoising(source, recipe, as_task(noise()) if recipe.images else ())


def run(stage: DenoiseStage, recipe: Recipe, tensors: tuple[Tensor, ...]) -> tuple[bytes, list[Saved], list[int]]:
    """The latents, the checkpoints on the way, and the steps that were told."""
    saved: list[Saved] = []
    told: list[int] = []

    def report(step: int, steps: int, checkpoint: Saved | None = None) -> None:
        told.append(step)
        if checkpoint:
            saved.append(checkpoint)

    return decodes_of(stage.run(recipe, tensors, report).tensors), saved, told


def check_all(source: Source, recipe: Recipe, embeddings: tuple[Tensor, ...], device: torch.device = CPU) -> None:
    wanted, saved, _ = run(denoiser(source, device=device), recipe, embeddings)
    assert run(denoiser(source, None, device=device), recipe, embeddings)[:2] == (wanted, [])
    assert saved
    other = denoiser(source, device=device)
    for checkpoint in saved:
        latents, further, told = run(other, recipe, (*embeddings, *checkpoint.tensors))
        assert latents == wanted, f"differs from step {checkpoint.step} on"
        assert told[0] == checkpoint.step
        assert all(step > checkpoint.step for step in told[1:])
        assert [later.step for later in further] == [s.step for s in saved if s.step > checkpoint.step]
    fresh = run(denoiser(source, device=device), recipe, (*embeddings, *saved[-1].tensors))
    assert fresh[0] == wanted


FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": tiny.flux, "sd15": tiny.sd15, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "chroma": tiny.chroma,
    "pixart": tiny.pixart,
}  # fmt: skip


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true-cfg"])
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.all] if name == "pixart" else []) for name in FAMILIES]
)
def test_another_worker_goes_on_from_any_step_in_any_family(family: str, guided: bool, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"negative_prompt": "blurry", "cfg_scale": 3.0} if guided else {"num_images": 2}
    check_all(*prepared(FAMILIES[family](), tmp_path / family, **fields))


@needs_gpus(1)
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_another_worker_goes_on_from_any_step_on_cuda(family: str, tmp_path: Path) -> None:
    check_all(*prepared(FAMILIES[family](), tmp_path), device=torch.device("cuda:0"))


def cogvideox() -> DiffusionPipeline:
    """A loop that carries a solver's last prediction along, beside the latents."""
    pipeline = tiny_videos.cogvideox()
    pipeline.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


VIDEOS: dict[str, tuple[Callable[[], DiffusionPipeline], int, bool]] = {  # frames, and whether it begins from a picture
    "two experts": (lambda: tiny_videos.wan(experts=2), 5, False),
    "a solver's last prediction": (cogvideox, 5, False),
    "latents and a scheduler of sound": (tiny_videos.ltx2, 5, False),
    "a loop for each section": (tiny_videos.framepack, 57, True),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_another_worker_goes_on_with_all_that_the_loops_of_a_video_carry_along(case: str, tmp_path: Path) -> None:
    check_video(case, tmp_path)


@needs_gpus(1)
@pytest.mark.parametrize("case", VIDEOS)
def test_another_worker_goes_on_with_a_video_on_cuda(case: str, tmp_path: Path) -> None:
    check_video(case, tmp_path, torch.device("cuda:0"))


def check_video(case: str, folder: Path, device: torch.device = CPU) -> None:
    make, frames, of_picture = VIDEOS[case]
    tiny.save(make(), folder)
    source = read("x", folder, None)
    images = ("0" * 64,) if of_picture else ()
    request = JobRequest(prompt="a star", steps=3, seed=3, width=32, height=32, frames=frames, images=images)
    recipe = resolve(request, describe(source), "float32", None, picture_size=(tiny.SIZE, tiny.SIZE))
    check_all(source, recipe, before_denoising(source, recipe, as_task(noise()) if of_picture else ()), device)


@pytest.mark.parametrize("scheduler", FLOW)
def test_it_goes_on_with_any_scheduler_of_flows(scheduler: str, tmp_path: Path) -> None:
    pipeline = tiny.sd3()
    pipeline.scheduler = getattr(diffusers, scheduler)()
    check_all(*prepared(pipeline, tmp_path))


@pytest.mark.parametrize("scheduler", NOISE)
def test_it_goes_on_with_any_scheduler_of_noise(scheduler: str, tmp_path: Path) -> None:
    pipeline = tiny.sd15()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    check_all(*prepared(pipeline, tmp_path))


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_it_goes_on_with_a_picture_to_begin_from(family: str, tmp_path: Path) -> None:
    pipeline = FAMILIES[family]()
    if family == "sdxl":
        pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    size = {} if family == "sdxl" else {"width": tiny.SIZE, "height": tiny.SIZE}
    tiny.save(pipeline, tmp_path)
    source = read("x", tmp_path, None)
    request = JobRequest(prompt="a star", steps=STEPS + 3, seed=3, images=("0" * 64,), strength=0.7, **size)
    recipe = resolve(request, describe(source), "float32", None, picture_size=(tiny.SIZE, tiny.SIZE))
    check_all(source, recipe, before_denoising(source, recipe, as_task(noise())))


def test_it_goes_on_with_noise_in_every_step(tmp_path: Path) -> None:
    pipeline = tiny.sd15()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    )
    check_all(*prepared(pipeline, tmp_path))


def test_a_streamed_denoiser_that_runs_modulation_ahead_goes_on_too(tmp_path: Path) -> None:
    source, recipe, embeddings = prepared(tiny.flux(depth=4), tmp_path)
    wanted, saved, _ = run(denoiser(source), recipe, embeddings)
    whole = sum(residency.total_bytes for residency in denoiser(source, budget=1 << 40).residencies)
    streamed = denoiser(source, budget=int(whole * 0.75))
    for checkpoint in saved:  # before it has watched a job, and after
        assert run(streamed, recipe, (*embeddings, *checkpoint.tensors))[0] == wanted
        assert run(streamed, recipe, embeddings)[0] == wanted
    (residency,) = streamed.residencies
    assert residency.state == "streamed"
    assert residency.modulation is not None


def test_what_cannot_be_stored_is_not_and_values_come_back_as_they_were() -> None:
    values = [None, True, 3, 0.1, "x", torch.arange(3), [torch.ones(2), None], (1, [2.5]), torch.tensor(1.5)]
    tensors: list[torch.Tensor] = []
    back = thaw(freeze(values, tensors), tensors, CPU)
    assert repr(back) == repr(values)
    for bad in (object(), {"a": 1}, [lambda: 0]):
        with pytest.raises(Unstorable):
            check_storable(bad)
        with pytest.raises(Unstorable):
            freeze(bad, [])

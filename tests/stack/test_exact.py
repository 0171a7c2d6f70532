"""The stack's picture is the plain pipeline's, to the last bit."""

from pathlib import Path

import pytest
import torch

from protocol.views import WorkerView
from tests import tiny
from tests.stacks import RunningStack, running_stack, triptych
from tests.tiny import needs_gpus, plain

PROMPT = "a large red circle at the top left"
CASES = {
    "guidance": ({}, {}),
    "guidance given": ({"guidance": 7.5}, {"guidance_scale": 7.5}),
    "true cfg": (
        {"negative_prompt": "a blurry star", "cfg_scale": 3.0},
        {"negative_prompt": "a blurry star", "true_cfg_scale": 3.0},
    ),
    "three pictures": ({"num_images": 3}, {"num_images_per_prompt": 3}),
    "three with true cfg": (
        {"num_images": 3, "negative_prompt": "blurry", "cfg_scale": 2.0},
        {"num_images_per_prompt": 3, "negative_prompt": "blurry", "true_cfg_scale": 2.0},
    ),
    "another size": ({"width": 48, "height": 32}, {"width": 48, "height": 32}),
}


def both(stack: RunningStack, folder: Path, dtype: torch.dtype, ours: dict, theirs: dict, device: str = "cpu") -> None:
    arguments = {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 48, "seed": 5} | theirs
    wanted = plain(folder, dtype, device, prompt=PROMPT, **arguments)
    options = {"height": 32, "width": 32, "steps": 3, "max_sequence_length": 48, "seed": 5} | ours
    _, first = stack.picture(PROMPT, **options)
    again, second = stack.picture(PROMPT, **options)
    assert again.cached
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)


@pytest.mark.parametrize("case", CASES)
def test_float32_equals_plain_pipeline_cold_and_cached(case: str, stack: RunningStack, flux_dev: Path) -> None:
    both(stack, flux_dev, torch.float32, *CASES[case])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpus(1))])
def test_bfloat16_equals_plain_pipeline(state: Path, flux_dev: Path, device: str) -> None:
    with running_stack(state, "--model", str(flux_dev), "--device", device, "--dtype", "bfloat16") as stack:
        for ours, theirs in CASES.values():
            both(stack, flux_dev, torch.bfloat16, ours, theirs, device)


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "float32"), pytest.param("cuda:0", "bfloat16", marks=needs_gpus(1))]
)
def test_demo_model_equals_plain_pipeline_by_its_defaults(state: Path, device: str, dtype: str) -> None:
    from workers.models.source import DEMO_FOLDER

    prompt = "a small blue star in the center on a white background"
    with running_stack(state, "--device", device) as stack:
        job, pictures = stack.picture(prompt, seed=3)
    recipe = job.recipe
    assert recipe.dtype == dtype
    wanted = plain(
        DEMO_FOLDER, getattr(torch, dtype), device, prompt=prompt, height=recipe.height, width=recipe.width,
        num_inference_steps=recipe.steps, max_sequence_length=recipe.max_sequence_length, seed=3,
    )  # fmt: skip
    assert torch.equal(pictures, wanted)


def denoiser(stack: RunningStack) -> WorkerView:
    return next(worker for worker in stack.client.workers().workers if worker.stage == "denoise")


@pytest.mark.all  # as test_leases does, with other budgets
def test_a_denoiser_streamed_through_little_memory_gives_equal_pictures(state: Path, tmp_path: Path) -> None:
    folder = tiny.save(tiny.flux(depth=4), tmp_path)
    size = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
    devices = ("--device", "cpu", "--device", "denoise=cpu:0", "--budget", f"0={int(0.8 * size)}B")
    with running_stack(state, "--model", str(folder), *devices, "--keep-alive", "denoise=0") as stack:
        for case in ("guidance", "true cfg", "another size"):
            both(stack, folder, torch.float32, *CASES[case])
        while (worker := denoiser(stack)).residency[0].state != "out":
            pass
        assert not any(worker.lease_bytes)
        (component,) = worker.residency  # let go of at once, and back for each of these jobs
        assert (component.component, component.state, component.device_bytes) == ("transformer", "out", 0)
        assert component.total_bytes > 0.8 * size
        assert "transformer out" in triptych("workers", folder=state).stdout

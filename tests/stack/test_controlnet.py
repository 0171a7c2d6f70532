"""A stack with a ControlNet beside its model: control images and prompts alone, each with its own pipeline's bits."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from tests import tiny
from tests.families.case import awake
from tests.families.pictures import controlnet
from tests.pictures import noise
from tests.stacks import running_stack, triptych
from tests.tiny_videos import frames_of

SIZE = {"width": tiny.SIZE, "height": tiny.SIZE}


def test_a_stack_answers_control_images_and_prompts_alone(state: Path, tmp_path: Path) -> None:
    model = tiny.save(tiny.sd15(), tmp_path / "model")
    torch.manual_seed(0)
    net: Any = awake(controlnet())
    net.save_pretrained(tmp_path / "net")
    refused = triptych("up", "--model", str(model), "--controlnet", str(model), folder=state)
    assert (refused.returncode, "is no ControlNet" in refused.stderr) == (4, True), refused.stderr
    pipeline: Any = diffusers.StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    control = noise((32, 32), 1)
    wanted = frames_of(
        pipeline(
            prompt="a red circle", image=control, num_inference_steps=4, controlnet_conditioning_scale=0.5,
            generator=torch.Generator("cpu").manual_seed(3), **SIZE,
        )
    )  # fmt: skip
    with running_stack(state, "--model", str(model), "--controlnet", str(tmp_path / "net")) as stack:
        settings = (("controlnet_conditioning_scale", "0.5"),)
        job, pictures = stack.picture("a red circle", control=control, settings=settings, seed=3, steps=4, **SIZE)
        assert torch.equal(pictures, wanted)
        assert stack.client.job(job.id).recipe.control
        alone = tiny.plain(model, prompt="a red circle", num_inference_steps=4, seed=3, **SIZE)
        assert torch.equal(stack.picture("a red circle", seed=3, steps=4, **SIZE)[1], alone)

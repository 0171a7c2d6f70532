"""A stack with a ControlNet beside its model: control images and prompts alone, each with its own pipeline's bits."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from protocol.errors import BadRequest, NotFound
from tests import tiny
from tests.families.case import awake
from tests.families.pictures import controlnet
from tests.pictures import noise
from tests.stacks import running_stack, triptych
from tests.tiny_videos import frames_of

SIZE = {"width": tiny.SIZE, "height": tiny.SIZE}


def test_jobs_choose_among_controlnets_by_name(state: Path, tmp_path: Path) -> None:
    model = tiny.save(tiny.sd15(), tmp_path / "model")
    control, settings, wanted = noise((32, 32), 1), {"num_inference_steps": 3, **SIZE}, {}
    flags = ["--model", str(model)]
    for name, seed in (("canny", 0), ("depth", 1)):
        torch.manual_seed(seed)
        net: Any = awake(controlnet())
        net.save_pretrained(tmp_path / name)
        flags += ["--controlnet-alias", f"{name}={tmp_path / name}"]
        pipeline: Any = diffusers.StableDiffusionControlNetPipeline.from_pretrained(model, controlnet=net)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(3)
        wanted[name] = frames_of(pipeline(prompt="a red circle", image=control, generator=generator, **settings))
    assert not torch.equal(wanted["canny"], wanted["depth"])
    with running_stack(state, *flags) as stack:
        given: Any = {"control": control, "seed": 3, "steps": 3, **SIZE}
        for name in ("canny", "depth", "canny"):
            job, picture = stack.picture("a red circle", controlnet=name, **given)
            assert torch.equal(picture, wanted[name])
        assert stack.client.job(job.id).cached
        alone = tiny.plain(model, prompt="a red circle", seed=3, **settings)
        assert torch.equal(stack.picture("a red circle", seed=3, steps=3, **SIZE)[1], alone)
        assert [view.name for view in stack.client.models()] == ["model", "model+canny", "model+depth"]
        with pytest.raises(NotFound, match="no ControlNet 'lines'") as unknown:
            stack.picture("a red circle", controlnet="lines", **given)
        assert "canny, depth" in unknown.value.hint
        with pytest.raises(BadRequest, match="is for a ControlNet") as none_chosen:
            stack.picture("a red circle", **given)
        assert "--controlnet" in none_chosen.value.hint
        with pytest.raises(BadRequest, match="needs a picture"):
            stack.picture("a red circle", controlnet="canny", seed=3, steps=3, **SIZE)


def test_a_job_may_choose_a_refiner(state: Path, tmp_path: Path) -> None:
    model = tiny.save(tiny.sdxl(), tmp_path / "model")
    tiny.sdxl_refiner().save_pretrained(tmp_path / "xl")
    settings, count = {"seed": 3, "steps": 5, **SIZE}, {"num_inference_steps": 5}
    base: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(model)
    refiner: Any = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
        tmp_path / "xl", text_encoder_2=base.text_encoder_2, vae=base.vae
    )
    generator = torch.Generator("cpu").manual_seed(3)
    latents = base("a star", **count, **SIZE, denoising_end=0.6, output_type="latent", generator=generator).images
    wanted = frames_of(refiner("a star", **count, image=latents, denoising_start=0.6, generator=generator))
    with running_stack(state, "--model", str(model), "--refiner-alias", f"xl={tmp_path / 'xl'}") as stack:
        picture = stack.picture("a star", refiner="xl", settings=(("refine_from", "0.6"),), **settings)[1]
        assert torch.equal(picture, wanted)
        alone = tiny.plain(model, prompt="a star", num_inference_steps=5, seed=3, **SIZE)
        assert torch.equal(stack.picture("a star", **settings)[1], alone)
        with pytest.raises(NotFound, match="no refiner 'l'"):
            stack.picture("a star", refiner="l", **settings)
        with pytest.raises(NotFound, match="no ControlNet 'xl'"):
            stack.picture("a star", controlnet="xl", **settings)
        with pytest.raises(BadRequest, match="don't go together"):
            stack.picture("a star", controlnet="xl", refiner="xl", **settings)
    done = triptych("run", "a star", "--model", str(model), "--refiner-alias", f"xl={tmp_path / 'xl'}", folder=state)
    assert (done.returncode, "nothing to choose among" in done.stderr) == (2, True), done.stderr


@pytest.mark.all
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

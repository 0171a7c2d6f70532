"""A ControlNet beside a model: its pictures are those of diffusers' ControlNet pipelines, and prompts alone go on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from protocol.client.input_pictures import picture_of
from protocol.errors import BadRequest, ModelMissing
from protocol.job import JobRequest
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.tensors import Tensor
from tests import tiny
from tests.families.case import awake
from tests.families.pictures import controlnet, flux_controlnet
from tests.pictures import half, noise
from tests.stages import through
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.source import Source, locate

SIZE = {"width": tiny.SIZE, "height": tiny.SIZE}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("controlnets")
    for name, model, net in (("sd15", tiny.sd15, controlnet), ("flux", tiny.flux, flux_controlnet)):
        tiny.save(model(), made / name)
        torch.manual_seed(0)
        awake(net()).save_pretrained(made / f"{name}-net")
    return made


def source_of(folders: Path, model: str, net: str | None = None) -> Source:
    return locate(ModelSpec(name=str(folders / model), controlnet=str(folders / (net or f"{model}-net"))), None)


def plainly(folders: Path, model: str, cls: str, **arguments: Any) -> torch.Tensor:
    kind = diffusers.ControlNetModel if model == "sd15" else diffusers.FluxControlNetModel
    net = kind.from_pretrained(folders / f"{model}-net")
    pipeline: Any = getattr(diffusers, cls).from_pretrained(folders / model, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    return frames_of(pipeline(prompt="a red circle", num_inference_steps=4, **arguments, generator=generator))


def given(control: Image.Image | None, image: Image.Image | None, mask: Image.Image | None) -> list[Tensor]:
    named = {"image:0": image, "control": control}
    found = [replace(picture_of(one), name=name) for name, one in named.items() if one is not None]
    return found if mask is None else [*found, replace(picture_of(mask, mask=True), name="mask")]


@pytest.mark.parametrize("model", ["sd15", pytest.param("flux", marks=pytest.mark.all)])
@pytest.mark.parametrize("task", ["control", pytest.param("image", marks=pytest.mark.all), "mask", "prompt"])
def test_pictures_are_those_of_the_plain_controlnet_pipeline(folders: Path, model: str, task: str) -> None:
    source = source_of(folders, model)
    description = describe(source)
    control = None if task == "prompt" else noise((32, 32), 1)
    image, mask = noise() if task in ("image", "mask") else None, half() if task == "mask" else None
    tensors = given(control, image, mask)
    digest = "0" * 64
    settings = () if task == "prompt" else (("controlnet_conditioning_scale", "0.5"),)
    request = JobRequest(
        prompt="a red circle", steps=4, seed=3, images=(digest,) if image else (), mask=digest if mask else None,
        control=digest if control else None, strength=0.5 if image else None, settings=settings, **SIZE,
    )  # fmt: skip
    recipe = resolve(request, description, "float32", None)
    named: dict[str, Any] = {"control_image": control, "image": image, "mask_image": mask}
    if model == "sd15" and task == "control":
        named = {"image": control}
    stem = "StableDiffusion" if model == "sd15" else "Flux"
    cls = {"prompt": f"{stem}Pipeline", "control": f"{stem}ControlNetPipeline",
           "image": f"{stem}ControlNetImg2ImgPipeline", "mask": f"{stem}ControlNetInpaintPipeline"}[task]  # fmt: skip
    if task == "prompt":
        wanted = tiny.plain(folders / model, prompt="a red circle", num_inference_steps=4, seed=3, **SIZE)
    else:
        more = {"strength": 0.5} if image else {}
        wanted = plainly(
            folders, model, cls, **{n: v for n, v in named.items() if v is not None}, **more, **SIZE,
            controlnet_conditioning_scale=0.5,
        )  # fmt: skip
    assert torch.equal(through(source, recipe, tensors), wanted)


def test_a_picture_that_a_controlnet_keeps_to_changes_the_result(folders: Path) -> None:
    source = source_of(folders, "sd15")
    request = JobRequest(prompt="a red circle", steps=4, seed=3, control="0" * 64, **SIZE)
    recipe = resolve(request, describe(source), "float32", None)
    one, other = (through(source, recipe, given(noise((32, 32), seed), None, None)) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_without_a_controlnet_a_control_image_is_refused(folders: Path) -> None:
    source = locate(ModelSpec(name=str(folders / "sd15")), None)
    with pytest.raises(BadRequest, match="takes no control image"):
        resolve(JobRequest(prompt="a red circle", control="0" * 64), describe(source), "float32", None)


def test_the_revision_is_of_both(folders: Path) -> None:
    alone, together = (locate(ModelSpec(name=str(folders / "sd15")), None), source_of(folders, "sd15"))
    assert together.revision.startswith(f"{alone.revision}+")


@pytest.mark.parametrize(
    ("model", "net", "words"),
    [
        ("sd15", "nowhere", "There is no ControlNet"),
        ("sd15", "sd15", "has no config.json"),
        ("sd15", "sd15/unet", "is no ControlNet, but UNet2DConditionModel"),
        ("flux", "sd15-net", "is a ControlNetModel, which doesn't go with a FluxPipeline"),
        ("sd15", "flux-net", "is a FluxControlNetModel, which doesn't go with a StableDiffusionPipeline"),
    ],
)
def test_what_is_no_controlnet_for_a_model_is_refused_in_a_line(
    folders: Path, model: str, net: str, words: str
) -> None:
    with pytest.raises(ModelMissing, match=words):
        describe(source_of(folders, model, net))


def test_a_controlnet_of_other_widths_is_refused(folders: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(2, 4),
    ).save_pretrained(tmp_path / "net")  # fmt: skip
    with pytest.raises(ModelMissing, match="cross_attention_dim is 64, the unet's 32"):
        describe(locate(ModelSpec(name=str(folders / "sd15"), controlnet=str(tmp_path / "net")), None))

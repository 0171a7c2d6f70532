"""SDXL with a refiner: the bits of diffusers' two pipelines one after the other, wherever a worker is killed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from protocol.errors import ModelMissing
from protocol.job import JobRequest, Recipe
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from tests import tiny
from tests.stages import go_through, through
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.source import Source, locate

REQUEST = {"prompt": "a red circle", "width": tiny.SIZE, "height": tiny.SIZE, "steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("refined")
    tiny.save(tiny.sdxl(), folder / "base")
    tiny.sdxl_refiner().save_pretrained(folder / "refiner")
    return folder / "base", folder / "refiner"


def source_of(folders: tuple[Path, Path]) -> Source:
    return locate(ModelSpec(name=str(folders[0]), refiner=str(folders[1])), None)


def recipe_of(source: Source, **given: Any) -> Recipe:
    return resolve(JobRequest.model_validate({**REQUEST, **given}), describe(source), "float32", None)


def plainly(folders: tuple[Path, Path], refine_from: float = 0.8, count: int = 1, **given: Any) -> torch.Tensor:
    """The pictures as diffusers' guide makes them, with one generator for both halves."""
    base: Any = StableDiffusionXLPipeline.from_pretrained(folders[0])
    refiner: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        folders[1], text_encoder_2=base.text_encoder_2, vae=base.vae
    )
    for pipeline in (base, refiner):
        pipeline.set_progress_bar_config(disable=True)
    shared = {
        "prompt": REQUEST["prompt"], "num_inference_steps": REQUEST["steps"], "num_images_per_prompt": count, **given,
        "generator": torch.Generator("cpu").manual_seed(3),
    }  # fmt: skip
    size = {"width": tiny.SIZE, "height": tiny.SIZE}
    latents = base(**shared, **size, denoising_end=refine_from, output_type="latent").images
    return frames_of(refiner(**shared, image=latents, denoising_start=refine_from))


def test_the_picture_is_that_of_both_pipelines(folders: tuple[Path, Path]) -> None:
    source = source_of(folders)
    assert describe(source).refined
    assert torch.equal(through(source, recipe_of(source)), plainly(folders))
    alone = through(locate(ModelSpec(name=str(folders[0])), None), recipe_of(source))
    assert not torch.equal(alone, plainly(folders))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"num_images": 2, "negative_prompt": "blurry"}, {"count": 2, "negative_prompt": "blurry"}),
        ({"settings": (("refine_from", "0.5"), ("guidance_rescale", "0.3"))},
         {"refine_from": 0.5, "guidance_rescale": 0.3}),
        ({"cfg_scale": 1.0}, {"guidance_scale": 1.0}),
    ],
)  # fmt: skip
def test_both_halves_get_what_a_job_says(
    folders: tuple[Path, Path], given: dict[str, Any], plain: dict[str, Any]
) -> None:
    source = source_of(folders)
    assert torch.equal(through(source, recipe_of(source, **given)), plainly(folders, **plain))


@pytest.mark.parametrize(
    "killed_at", [1, pytest.param(4, marks=pytest.mark.all), 5, pytest.param(6, marks=pytest.mark.all)]
)
def test_a_worker_that_dies_in_either_half_costs_no_bit(folders: tuple[Path, Path], killed_at: int) -> None:
    source = source_of(folders)
    tensors, way = go_through(source, recipe_of(source), killed_at=killed_at)
    assert way == ["text", "denoise", "vae"]
    made = torch.frombuffer(bytearray(tensors[0].data), dtype=torch.uint8).reshape(tensors[0].shape)
    assert torch.equal(made, plainly(folders))


def test_a_refiner_for_another_model_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tiny.save(tiny.sd15(), tmp_path / "sd15")
    tiny.sdxl_refiner(second=64).save_pretrained(tmp_path / "wide")
    for base, refiner, why in (
        (folders[0], folders[0], "is no refiner, but a StableDiffusionXLPipeline"),
        (tmp_path / "sd15", folders[1], "refiners are for SDXL"),
        (folders[0], tmp_path / "wide", "cross_attention_dim is 64"),
    ):
        with pytest.raises(ModelMissing, match=why):
            describe(locate(ModelSpec(name=str(base), refiner=str(refiner)), None))
    with pytest.raises(ModelMissing, match="no ControlNet"):
        locate(ModelSpec(name=str(folders[0]), refiner=str(folders[1]), controlnet="x"), None)

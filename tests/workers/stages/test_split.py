"""The generic split: text, denoise and vae apart give the plain pipeline's pictures, in any family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from protocol.job import JobRequest, Recipe
from protocol.recipe import resolve
from tests import tiny
from workers.errors import Cancelled, StageError
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import Source, read
from workers.stages.contract import Saved, unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage, returned_names
from workers.stages.vae import VaeStage
from workers.tensors import to_wire

CPU = torch.device("cpu")
FAMILIES: dict[str, Callable[[], DiffusionPipeline]] = {
    "flux": tiny.flux,
    "sd15": tiny.sd15,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "chroma": tiny.chroma,
    "pixart": tiny.pixart,
}


def stages(source: Source, dtype: torch.dtype = torch.float32) -> tuple[TextStage, DenoiseStage, VaeStage]:
    devices = Devices(CPU)
    text, denoise, vae = (load(source, stage, devices, dtype) for stage in ("text", "denoise", "vae"))
    return TextStage(text, CPU), DenoiseStage(denoise, CPU), VaeStage(vae, CPU)


def through(source: Source, recipe: Recipe) -> torch.Tensor:
    tensors: tuple[Any, ...] = ()
    for stage in stages(source):
        tensors = tuple(stage.run(recipe, tensors, unheard).tensors)
    (pictures,) = tensors
    return torch.frombuffer(bytearray(pictures.data), dtype=torch.uint8).reshape(pictures.shape)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "true-cfg"])
@pytest.mark.parametrize("family", FAMILIES)
def test_three_stages_equal_the_plain_pipeline(family: str, guided: bool, tmp_path: Path) -> None:
    folder = tiny.save(FAMILIES[family](), tmp_path / family)
    source = read(str(folder), folder, None)
    model = describe(source)
    scale = 3.0 if guided else (1.0 if model.cfg_scale and model.cfg_scale > 1 else None)
    request = JobRequest(
        prompt="a red circle", negative_prompt="blurry" if guided else None, cfg_scale=scale, steps=3, seed=11,
        width=tiny.SIZE, height=tiny.SIZE, num_images=2,
    )  # fmt: skip
    recipe = resolve(request, model, "float32", None)
    theirs: dict[str, Any] = {"prompt": "a red circle", "height": tiny.SIZE, "width": tiny.SIZE, "seed": 11}
    theirs |= {"num_inference_steps": 3, "num_images_per_prompt": 2}
    if guided:
        theirs["negative_prompt"] = "blurry"
    if family == "pixart":
        theirs["use_resolution_binning"] = False
    if scale is not None:
        theirs["true_cfg_scale" if family == "flux" else "guidance_scale"] = scale
    assert torch.equal(through(source, recipe), tiny.plain(folder, **theirs))


def test_each_stage_loads_only_its_own_weights(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    text, denoise, vae = (
        load(source, stage, Devices(CPU), torch.float32).pipeline for stage in ("text", "denoise", "vae")
    )
    assert text.transformer is None
    assert text.vae is None
    assert denoise.text_encoder is None
    assert denoise.text_encoder_2 is None
    assert vae.transformer is None
    assert vae.text_encoder_2 is None
    assert all(parameter.is_meta for parameter in denoise.vae.parameters())


def test_description_is_read_from_configuration_and_code(flux_dev: Path, flux_schnell: Path, tmp_path: Path) -> None:
    dev, schnell = (describe(read(str(folder), folder, None)) for folder in (flux_dev, flux_schnell))
    assert (dev.size_multiple, dev.width, dev.steps, dev.guidance, dev.cfg_scale) == (4, 256, 28, 3.5, 1.0)
    assert schnell.guidance is None
    assert (dev.max_sequence_length, dev.max_sequence_limit) == (512, 512)
    folder = tiny.save(tiny.sd15(), tmp_path / "sd15")
    sd15 = describe(read(str(folder), folder, None))
    assert (sd15.guidance, sd15.cfg_scale, sd15.max_sequence_length, sd15.max_sequence_limit) == (None, 7.5, None, 77)


def test_a_folder_and_its_copy_have_one_fingerprint_and_a_changed_weight_another(
    flux_dev: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(flux_dev, copy)
    assert read("x", copy, None).revision == read("y", flux_dev, None).revision
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert read("x", copy, None).revision != read("y", flux_dev, None).revision


def test_cancel_stops_at_a_step_boundary_and_the_stage_goes_on(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    text, denoise, _ = stages(source)
    recipe = resolve(JobRequest(prompt="a", steps=4, seed=1, width=32, height=32), describe(source), "float32", None)
    embeddings = tuple(text.run(recipe, (), unheard).tensors)
    seen: list[int] = []

    def report(step: int, steps: int, saved: Saved | None = None) -> None:
        seen.append(step)
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        denoise.run(recipe, embeddings, report)
    assert seen == [0, 1, 2]
    undisturbed = denoise.run(recipe, embeddings, unheard)
    fresh = stages(source)[1].run(recipe, embeddings, unheard)
    assert undisturbed.tensors[0].data == fresh.tensors[0].data


def test_nan_is_a_failure_and_never_a_black_picture(flux_dev: Path) -> None:
    source = read(str(flux_dev), flux_dev, None)
    _, denoise, vae = stages(source)
    recipe = resolve(JobRequest(prompt="a", steps=1, seed=1, width=32, height=32), describe(source), "float32", None)
    bad = to_wire("decode:0", torch.full((1, 4, 16, 16), torch.nan))
    with pytest.raises(StageError, match="NaN"):
        vae.run(recipe, (bad,), unheard)
    embeddings = (
        to_wire("prompt_embeds", torch.full((1, 512, 32), torch.inf)),
        to_wire("pooled_prompt_embeds", torch.zeros(1, 32)),
    )
    with pytest.raises(StageError, match="NaN"):
        denoise.run(recipe, embeddings, unheard)


def test_returned_names_are_those_of_the_last_return() -> None:
    def encode(a: int) -> tuple[int, int]:
        if a:
            return a, a
        prompt_embeds = pooled = a
        return prompt_embeds, pooled

    assert returned_names(encode) == ["prompt_embeds", "pooled"]

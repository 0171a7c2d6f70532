"""The classes of the table of families, one by one."""

from typing import Any

import pytest

from scripts.families import run
from tests.families import CASES


@pytest.mark.all
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # of torch and NumPy, in the scheduler of Helios
@pytest.mark.parametrize("name", CASES)
def test_a_class_gives_the_bits_of_the_plain_pipeline(name: str) -> None:
    how, why = run(name)
    assert how in ("equal", "not run"), why


USED = (  # today, most of all
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxKontextPipeline", "Flux2Pipeline",
    "Flux2KleinPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "ZImagePipeline", "ChromaPipeline",
    "Krea2Pipeline", "HiDreamImagePipeline", "SanaPipeline", "WanPipeline", "WanImageToVideoPipeline", "LTXPipeline",
    "LTX2Pipeline", "CogVideoXPipeline", "HunyuanVideo15Pipeline", "WanAnimatePipeline",
    "HunyuanVideoFramepackPipeline",
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"}, "guided": {"guided": True}, "killed in the middle": {"killed_at": 2},
}  # fmt: skip


@pytest.mark.all
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", USED)
def test_what_is_used_most_gives_the_bits_of_the_plain_pipeline_in_every_way(name: str, way: str) -> None:
    how, why = run(name, **WAYS[way])
    assert how == "equal", why


@pytest.mark.parametrize("name", ["StableDiffusionXLControlNetPipeline", "AmusedInpaintPipeline", "Krea2Pipeline"])
def test_control_images_own_quantizers_and_settings_of_lists(name: str) -> None:
    assert run(name)[0] == "equal"

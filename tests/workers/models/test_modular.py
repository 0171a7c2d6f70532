"""Modular pipelines, which have blocks and no call of their own, give the bits that they give plainly."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline

from protocol.client.input_pictures import picture_of, video_of
from protocol.job import JobRequest
from protocol.pictures import as_given
from protocol.recipe import resolve
from tests import tiny_modular
from tests.pictures import noise
from tests.stages import through
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.source import read

STEPS = 3


@dataclass(frozen=True, slots=True)
class Case:
    make: Callable[[Path], Path]
    output: str = "images"
    image: bool = False
    videos: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "flux3": Case(tiny_modular.flux3),
    "flux3 of a picture": Case(tiny_modular.flux3, image=True),
    "flux3 distilled": Case(tiny_modular.flux3_distilled),
    "flux2 klein": Case(tiny_modular.flux2_klein),
    "flux2 klein of a picture": Case(tiny_modular.flux2_klein, image=True),
    "wan animate 2": Case(tiny_modular.wan_animate_2, "videos", True, ("driving_video",), {"segment_frame_length": 5}),
    "minimax h3": Case(tiny_modular.minimax_h3, "videos"),
    "qwen-image": Case(tiny_modular.qwen_image),
    "z-image": Case(tiny_modular.z_image),
}
SHORT = ("flux3", "flux2 klein of a picture")


@pytest.mark.filterwarnings("ignore:flex_attention called", "ignore:.*weight_norm")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.all]) for name in CASES]
)
def test_a_modular_pipeline_gives_the_bits_that_it_gives_plainly(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = case.make(tmp_path / "model")
    picture, clip = noise((64, 64), 3), [noise((32, 32), number) for number in range(9)]
    pipeline: Any = ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components(dtype=torch.float32)
    asked: dict[str, Any] = {"image": picture} if case.image else {}
    asked |= dict.fromkeys(case.videos, clip)
    made = pipeline(
        prompt="a red circle", height=32, width=32, num_inference_steps=STEPS, output_type="pil", output=case.output,
        generator=torch.Generator().manual_seed(4), **asked, **case.settings,
    )  # fmt: skip
    wanted = frames_of(type("Output", (), {"frames": [made] if case.output == "images" else made}))

    source = read(str(folder), folder, None)
    given = {"image:0": picture_of(picture)} if case.image else {}
    given |= {f"video:{name}": video_of(clip) for name in case.videos}
    request = JobRequest(
        prompt="a red circle", width=32, height=32, steps=STEPS, seed=4,
        images=(given["image:0"].name,) if case.image else (),
        videos=tuple((name, given[f"video:{name}"].name) for name in case.videos),
        settings=tuple((name, str(value)) for name, value in case.settings.items()),
    )  # fmt: skip
    recipe = resolve(request, describe(source), "float32", None, video_frames=9, picture_size=(64, 64))
    pictures = {picture.name: picture for picture in given.values()}
    tensors = as_given(recipe.named_pictures, pictures)
    assert torch.equal(through(source, recipe, tensors), wanted)
    assert torch.equal(through(source, recipe, tensors, killed_at=2), wanted)  # it tells its steps, and begins anew

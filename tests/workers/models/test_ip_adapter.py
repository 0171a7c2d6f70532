"""An IP-Adapter beside a model: its pictures are those of diffusers' pipelines that loaded it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from diffusers.models.embeddings import ImageProjection
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from protocol.client.input_pictures import picture_of
from protocol.errors import BadRequest, ModelMissing
from protocol.job import JobRequest
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from tests import tiny
from tests.pictures import noise
from tests.stages import through
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.source import Source, locate

SIZE = {"width": tiny.SIZE, "height": tiny.SIZE}
PICTURE = noise((48, 40), 7)


def adapter_of(unet: Any, width: int) -> dict[str, torch.Tensor]:
    """Weights of an IP-Adapter, for every attention of a UNet to its prompt."""
    channels, dim = unet.config.block_out_channels, unet.config.cross_attention_dim
    found: dict[str, torch.Tensor] = {}
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        place, _, rest = name.partition(".")
        block = int(rest.partition(".")[0]) if place != "mid_block" else -1
        hidden = (tuple(reversed(channels)) if place == "up_blocks" else channels)[block]
        weights = IPAdapterAttnProcessor(hidden, dim, scale=1.0).state_dict()
        for part in ("to_k_ip", "to_v_ip"):
            found[f"ip_adapter.{number}.{part}.weight"] = weights[f"{part}.0.weight"]
        number += 2
    projection = ImageProjection(cross_attention_dim=dim, image_embed_dim=width, num_image_text_embeds=4).state_dict()
    return found | {
        f"image_proj.{name.replace('image_embeds', 'proj')}": value.contiguous() for name, value in projection.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ip")
    model = tiny.sd15()
    tiny.save(model, made / "model")
    torch.manual_seed(5)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    (made / "adapter").mkdir()
    CLIPVisionModelWithProjection(vision).eval().save_pretrained(made / "adapter" / "image_encoder")
    save_file(adapter_of(model.unet, 16), made / "adapter" / "ip.safetensors")
    return made


def source_of(folder: Path) -> Source:
    return locate(ModelSpec(name=str(folder / "model"), ip_adapter=str(folder / "adapter" / "ip.safetensors")), None)


@pytest.mark.parametrize("scale", [None, 0.4])
def test_pictures_are_those_of_the_plain_pipeline_with_the_adapter(folder: Path, scale: float | None) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder / "model")
    pipeline.load_ip_adapter(str(folder / "adapter"), subfolder="", weight_name="ip.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    if scale is not None:
        pipeline.set_ip_adapter_scale(scale)
    wanted = frames_of(
        pipeline(
            "a red circle", ip_adapter_image=PICTURE, num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(2), **SIZE,
        )
    )  # fmt: skip
    source, given = source_of(folder), replace(picture_of(PICTURE), name="ip_image")
    request = JobRequest(prompt="a red circle", steps=3, seed=2, ip_image="0" * 64, ip_scale=scale, **SIZE)
    made = through(source, resolve(request, describe(source), "float32", None), [given])
    assert torch.equal(made, wanted)


def test_what_an_ip_adapter_needs_is_asked_for(folder: Path) -> None:
    with_one, without = describe(source_of(folder)), describe(locate(ModelSpec(name=str(folder / "model")), None))
    prompt, digest = "a red circle", "0" * 64
    with pytest.raises(BadRequest, match="needs a picture"):
        resolve(JobRequest(prompt=prompt), with_one, "float32", None)
    with pytest.raises(BadRequest, match="has no IP-Adapter"):
        resolve(JobRequest(prompt=prompt, ip_image=digest), without, "float32", None)
    with pytest.raises(BadRequest, match="no meaning without its picture"):
        resolve(JobRequest(prompt=prompt, ip_scale=0.5), without, "float32", None)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nowhere.safetensors", "There is no IP-Adapter"),
        ("model/unet/config.json", "There is no IP-Adapter"),
        ("model/unet/diffusion_pytorch_model.safetensors", "has no image encoder"),
        ("adapter/image_encoder/model.safetensors", "has no image encoder"),
    ],
)
def test_what_is_no_ip_adapter_is_refused_in_a_line(folder: Path, file: str, words: str) -> None:
    with pytest.raises(ModelMissing, match=words):
        describe(locate(ModelSpec(name=str(folder / "model"), ip_adapter=str(folder / file)), None))


def test_one_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "image_encoder").symlink_to(folder / "adapter" / "image_encoder")
    wrong = {
        n: v if n.startswith("image") else v[:, :7].contiguous() for n, v in adapter_of(tiny.sd15().unet, 16).items()
    }
    save_file(wrong, tmp_path / "ip.safetensors")
    with pytest.raises(ModelMissing, match="doesn't go with"):
        describe(locate(ModelSpec(name=str(folder / "model"), ip_adapter=str(tmp_path / "ip.safetensors")), None))

"""SDXL's shapes with a ControlNet beside it, random weights, on one GPU: plainly, and stage after stage.

    python -m scripts.bench.controlnet FOLDER plain
    python -m scripts.bench.controlnet FOLDER stages [--room 8GB]

The first call makes the model in FOLDER (10 GB). `stages` runs each stage alone, the denoiser and its ControlNet within
`--room` bytes of weights, and compares the picture's bits with those that `plain` has left in FOLDER.
"""

import gc
import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from protocol.units import parse_bytes

DTYPE, STEPS, SEED, PROMPT = torch.bfloat16, 20, 5, "a red circle"


def make(folder: Path) -> None:
    """Write the model and its ControlNet, with random weights."""
    from diffusers import (
        AutoencoderKL,
        ControlNetModel,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests import tiny

    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True, sample_size=128,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        net = ControlNetModel.from_unet(unet)
        for parameter in net.parameters():
            if not parameter.any():  # what it adds by begins with zeros
                torch.nn.init.normal_(parameter, std=0.01)
        vocabulary: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
        one = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                             projection_dim=768, **vocabulary)  # fmt: skip
        two = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                             projection_dim=1280, **vocabulary)  # fmt: skip
        encoders = CLIPTextModel(one), CLIPTextModelWithProjection(two)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tiny.clip_tokenizer(),
        tokenizer_2=tiny.clip_tokenizer(), unet=unet, scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    ).save_pretrained(folder / "model")  # fmt: skip
    net.save_pretrained(folder / "net")


@click.command(help=(__doc__ or "").split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("what", type=click.Choice(["plain", "stages"]))
@click.option("--room", default="100GB", show_default=True, help="For the denoiser's weights and its ControlNet's.")
def main(folder: Path, what: str, room: str) -> None:
    if not (folder / "net").exists():
        make(folder)
        gc.collect()
        torch.cuda.empty_cache()
    (plain if what == "plain" else stages)(folder, parse_bytes(room))


def plain(folder: Path, _: int) -> None:
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    from tests.pictures import noise
    from tests.tiny_videos import frames_of

    net = ControlNetModel.from_pretrained(folder / "net", dtype=DTYPE)
    cls: Any = StableDiffusionXLControlNetPipeline
    pipeline = cls.from_pretrained(folder / "model", controlnet=net, dtype=DTYPE).to("cuda")
    pipeline.set_progress_bar_config(disable=True)
    for turn in range(2):
        torch.cuda.reset_peak_memory_stats()
        start = time.time()
        made = frames_of(
            pipeline(
                PROMPT, image=noise((1024, 1024)), num_inference_steps=STEPS,
                generator=torch.Generator("cpu").manual_seed(SEED),
            )
        )  # fmt: skip
        told = {"seconds": round(time.time() - start, 2), "gpu_peak": torch.cuda.max_memory_allocated()}
        print(json.dumps({"what": "plain", "turn": turn, **told}), flush=True)
    made.numpy().tofile(folder / "plain.raw")


def stages(folder: Path, room: int) -> None:
    from dataclasses import replace

    from protocol.client.input_pictures import picture_of
    from protocol.job import JobRequest
    from protocol.model_spec import ModelSpec
    from protocol.pictures import CONTROL, pictures_among
    from protocol.recipe import resolve
    from protocol.stages import FIRST, Stage
    from protocol.tensors import Tensor
    from tests.pictures import noise
    from workers.models.description import describe
    from workers.models.devices import Devices
    from workers.models.loading import load
    from workers.models.source import locate
    from workers.stages.contract import unheard
    from workers.stages.denoise import DenoiseStage
    from workers.stages.text import TextStage
    from workers.stages.vae import VaeStage

    device = torch.device("cuda:0")
    source = locate(ModelSpec(name=str(folder / "model"), controlnet=str(folder / "net")), None)
    picture = picture_of(noise((1024, 1024)))
    request = JobRequest(prompt=PROMPT, steps=STEPS, seed=SEED, control=picture.name)
    recipe = resolve(request, describe(source), "bfloat16", None)
    given = (replace(picture, name=CONTROL),)
    kinds: dict[Stage, Any] = {"text": TextStage, "denoise": DenoiseStage, "vae": VaeStage}
    left: tuple[Tensor, ...] = ()
    stage: Stage | None = FIRST
    while stage:
        devices = Devices(device, {0: room}) if stage == "denoise" else Devices(device)
        runner = kinds[stage](load(source, stage, devices, DTYPE), device)
        for turn in range(2):
            torch.cuda.reset_peak_memory_stats()
            start = time.time()
            outcome = runner.run(recipe, (*left, *given), unheard)
            torch.cuda.synchronize()
            told = {"seconds": round(time.time() - start, 2), "gpu_peak": torch.cuda.max_memory_allocated()}
            states = {residency.name: residency.state for residency in runner.residencies}
            print(json.dumps({"what": stage, "turn": turn, **told, "weights": states}), flush=True)
        left, stage = tuple(outcome.tensors), outcome.next
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    same = bytes(pictures_among(left).data) == (folder / "plain.raw").read_bytes()
    print(json.dumps({"what": "the picture", "equal": same}), flush=True)


if __name__ == "__main__":
    main()

"""Train the demo model's two LoRAs: `outline` draws shapes as outlines, `night` in front of black.

    python -m scripts.demo_model.train_loras --steps 500

Some six to twelve minutes each on two cores. What they learn from is drawn by code, as the model's own pictures were.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from scripts.demo_model.scenes import COLORS, SceneBatch
from scripts.demo_model.train import (
    BUCKETS,
    Artist,
    Lessons,
    PromptPool,
    StepDeadlines,
    Texts,
    flow_loss,
    flow_optimizer,
)

MODEL = Path(__file__).parents[2] / "workers" / "demo_model"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.0.proj", "net.2"]
LINE = 0.13  # half of an outline's width, in radii of the shape


class OutlineArtist(Artist):
    """Draws the outlines of shapes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.atlas = (self.atlas + LINE).abs() - LINE


class NightArtist(Artist):
    """Draws in front of black, whatever the prompt says."""

    def draw(self, batch: SceneBatch, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        black = list(COLORS).index("black")
        night = SceneBatch(batch.attributes, torch.full_like(batch.background, black), batch.second)
        picture, good = super().draw(night, height, width)
        return picture, good & (batch.attributes[:, :, 0] != black).all(1)


STYLES: dict[str, Callable[[str, int], Artist]] = {"outline": OutlineArtist, "night": NightArtist}


def train(name: str, pipeline: FluxPipeline, pool: PromptPool, texts: Texts, steps: int, batch: int, rank: int) -> None:
    """Train one, and write it beside the model."""
    bucket = BUCKETS[0]
    lessons = Lessons.of(pipeline.vae, pool, STYLES[name]("cpu", 1), 4096, bucket.height, bucket.width)
    transformer = pipeline.transformer
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), adapter_name=name)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer, generator = flow_optimizer(parameters), torch.Generator().manual_seed(0)
    pace = StepDeadlines(60, 3e-3, steps)
    for step in range(steps):
        pace.set(optimizer, step)
        loss = flow_loss(transformer, texts, lessons, bucket, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{name} {step} loss {loss.item():.4f}", flush=True)
    found = get_peft_model_state_dict(transformer, adapter_name=name)
    tensors = {f"transformer.{key}": value.to(torch.bfloat16).contiguous() for key, value in found.items()}
    words = {"modelspec.architecture": "Triptych's demo model", "modelspec.license": "Apache-2.0"}
    path = MODEL / "loras" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, words | {"trained": json.dumps({"steps": steps, "batch": batch, "rank": rank})})
    print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB", flush=True)
    transformer.delete_adapters(name)


@click.command(help=__doc__.split("\n")[0])
@click.option("--only", type=click.Choice(list(STYLES)))
@click.option("--steps", default=500, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--rank", default=8, show_default=True)
@click.option("--pool", default=20_000, show_default=True, help="different prompts")
def main(only: str | None, steps: int, batch: int, rank: int, pool: int) -> None:
    pipeline = FluxPipeline.from_pretrained(MODEL)
    prompts = PromptPool(pool, "cpu", 3)
    texts = Texts.of(pipeline.text_encoder, pipeline.text_encoder_2, prompts)
    for name in [only] if only else STYLES:
        train(name, pipeline, prompts, texts, steps, batch, rank)


if __name__ == "__main__":
    main()

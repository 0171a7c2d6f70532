"""A stack on Qwen-Image's real shapes with random weights, in a part of a GPU, held to the bits of plain diffusers.

    python -m scripts.bench.qwen_in_small_memory /tmp/qwen --layers 20 --encoder-layers 10 --budget 10GiB
    python -m scripts.bench.qwen_in_small_memory /tmp/qwen --budget 16GiB     # all of it, 58 GB on the disk

Its text encoder and VAE leave bytes on a GPU that no lease gives back, and its denoiser needs nearly all that there is:
with those bytes booked as leases no picture ever came. Prints a JSON line for each picture.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from protocol.client.client import Client
from scripts.bench.random_flux import random_weights

TRIPTYCH = [sys.executable, "-m", "orchestrator.cli"]
PROMPTS = ("a lighthouse in a storm", "a small blue star on a yellow background")
SEED = 7


def tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer of one token a byte: random weights know no words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate([*letters, *special])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072)


def parts(layers: int, encoder_layers: int, tiny: bool) -> dict[str, torch.nn.Module]:
    """The models on the meta device, with the shapes of Qwen/Qwen-Image, or next to nothing for a dry run."""
    width, heads, head = (64, 4, 16) if tiny else (3584, 28, 128)
    text = {
        "hidden_size": width, "intermediate_size": width * 2 if tiny else 18944, "num_hidden_layers": encoder_layers,
        "num_attention_heads": heads, "num_key_value_heads": 4, "vocab_size": 1024 if tiny else 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [2, 3, 3] if tiny else [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 1 if tiny else 32, "hidden_size": 32 if tiny else 1280, "intermediate_size": 64 if tiny else 3420,
        "num_heads": 2 if tiny else 16, "out_hidden_size": width, "fullatt_block_indexes": [0] if tiny else [7, 15],
    }  # fmt: skip
    with torch.device("meta"):
        return {
            "text_encoder": Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
            ),
            "transformer": QwenImageTransformer2DModel(
                patch_size=2, in_channels=64, out_channels=16, num_layers=layers, attention_head_dim=head,
                num_attention_heads=2 if tiny else 24, joint_attention_dim=width, guidance_embeds=False,
                axes_dims_rope=(4, 6, 6) if tiny else (16, 56, 56),
            ),
        }  # fmt: skip


def make(folder: Path, device: str, layers: int, encoder_layers: int, tiny: bool) -> None:
    torch.manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage(base_dim=8 if tiny else 96)
    models = {name: random_weights(model, device) for name, model in parts(layers, encoder_layers, tiny).items()}
    pipeline = QwenImagePipeline(
        scheduler=scheduler, vae=random_weights(vae, device), tokenizer=tokenizer(), **models
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="10GB")


def plain(folder: Path, device: str, steps: int, size: int, dtype: torch.dtype) -> list[np.ndarray[Any, Any]]:
    """The pictures of one process that holds everything."""
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for prompt in PROMPTS:
        generator = torch.Generator("cpu").manual_seed(SEED)
        start = time.perf_counter()
        image = pipeline(
            prompt, width=size, height=size, num_inference_steps=steps, generator=generator, output_type="np"
        ).images[0]  # fmt: skip
        row(what="plain diffusers, all on the GPU", prompt=prompt, s=round(time.perf_counter() - start, 3))
        found.append((image * 255).round().astype("uint8"))
    return found


@contextlib.contextmanager
def stack(folder: Path, budget: str, cpu: bool) -> Iterator[Client]:
    place = ["--device", "cpu:0"] if cpu else []
    with tempfile.TemporaryDirectory() as state:
        process = subprocess.Popen(
            [*TRIPTYCH, "up", "--state", state, "--model", str(folder), "--budget", f"0={budget}", "--json", *place],
            stdout=subprocess.PIPE,
        )
        try:
            assert process.stdout
            if process.stdout.readline():
                with Client(Path(state), timeout=60) as client:
                    yield client
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            for name in ("orchestrator", "text-1", "denoise-1", "vae-1", "describer"):
                path = Path(state) / "logs" / f"{name}.log"
                log = path.read_text().splitlines() if path.exists() else []
                leases = sum("lease of" in line for line in log)
                row(what="log", of=name, lines=len(log), leases=leases, last=log[-8:])


def row(**values: Any) -> None:
    print(json.dumps(values), flush=True)


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=60, show_default=True, help="of the denoiser")
@click.option("--encoder-layers", default=28, show_default=True)
@click.option("--budget", default="16GiB", show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--size", default=1024, show_default=True, help="pixels of a side")
@click.option("--seconds", default=200.0, show_default=True, help="to wait for a picture")
@click.option("--dry-run", is_flag=True, help="next to nothing, on the CPU that plays a GPU")
def main(folder: Path, layers: int, encoder_layers: int, budget: str, steps: int, size: int, seconds: float,
         dry_run: bool) -> None:  # fmt: skip
    device = "cpu" if dry_run else "cuda"
    start = time.perf_counter()
    if not folder.exists():
        make(folder, device, layers, encoder_layers, dry_run)
        row(what="model made", s=round(time.perf_counter() - start, 1))
    wanted = plain(folder, device, steps, size, torch.float32 if dry_run else torch.bfloat16)
    if not dry_run:
        torch.cuda.empty_cache()
    with stack(folder, budget, dry_run) as client:
        for turn in range(2):
            for prompt, image in zip(PROMPTS, wanted, strict=True):
                start = time.perf_counter()
                job = client.submit(prompt, width=size, height=size, steps=steps, seed=SEED)
                done = client.wait(job.id, timeout=seconds)
                took = time.perf_counter() - start
                mine = np.asarray(client.pictures(job.id)[0])
                warnings = [warning for record in client.job(job.id).records for warning in record.warnings]
                row(what=f"the stack in {budget}", prompt=prompt, turn=turn, s=round(took, 3),
                    equal=bool(np.array_equal(mine, image)), state=done.state, warnings=warnings)  # fmt: skip


if __name__ == "__main__":
    main()

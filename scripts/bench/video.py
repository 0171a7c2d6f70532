"""A video of Wan 2.1 T2V 1.3B's shapes, random weights, in bfloat16: the plain pipeline beside the stages, one by one.

    python -m scripts.bench.video plain FOLDER      # makes the model there first, 15 GB, if there is none
    python -m scripts.bench.video stages FOLDER     # afterwards; says whether its frames are the same

On the first CUDA GPU: 81 frames of 832 x 480, 10 steps, with guidance. Prints JSON lines: seconds, and peaks of GPU and
host memory in bytes.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from protocol.job import JobRequest
from protocol.pictures import pictures_among
from protocol.recipe import resolve
from protocol.stages import FIRST, Stage
from protocol.tensors import Tensor
from tests import tiny
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.source import read
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage

GPU = torch.device("cuda:0")
PROMPT, NEGATIVE, STEPS, SEED = "a red circle", "blurry", 10, 5
STAGES: dict[Stage, Any] = {"text": TextStage, "denoise": DenoiseStage, "vae": VaeStage}


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make(folder: Path) -> None:
    """Save a model of the real shapes with random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(GPU):
        torch.manual_seed(0)
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64)
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=8960, num_layers=30, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
            rope_max_seq_len=1024,
        )  # fmt: skip
        vae = AutoencoderKLWan()
    torch.set_default_dtype(torch.float32)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=tiny.t5_tokenizer(), text_encoder=encoder, vae=vae, scheduler=scheduler, transformer=transformer
    ).save_pretrained(folder)


def plain(folder: Path, frames: Path) -> None:
    if not folder.exists():
        make(folder)
        gc.collect()
        torch.cuda.empty_cache()
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(GPU)
    pipeline.set_progress_bar_config(disable=True)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    made = frames_of(
        pipeline(PROMPT, NEGATIVE, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(SEED))
    )
    seconds = time.perf_counter() - start
    say(what="plain", s=round(seconds, 2), gpu_peak=torch.cuda.max_memory_allocated(), host_peak=host_peak(),
        frames=list(made.shape))  # fmt: skip
    made.numpy().tofile(frames)


def stages(folder: Path, frames: Path) -> None:
    source = read("wan", folder, None)
    request = JobRequest(prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS, seed=SEED)
    recipe = resolve(request, describe(source), "bfloat16", None)
    following: Stage | None = FIRST
    tensors: tuple[Tensor, ...] = ()
    total = 0.0
    while following:
        stage = following
        runner = STAGES[stage](load(source, stage, Devices(GPU), torch.bfloat16), GPU)
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        outcome = runner.run(recipe, tensors, unheard)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        total += seconds
        say(stage=stage, s=round(seconds, 2), weights=weights, gpu_peak=torch.cuda.max_memory_allocated(),
            left=sum(tensor.nbytes for tensor in outcome.tensors))  # fmt: skip
        tensors, following = tuple(outcome.tensors), outcome.next
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    equal = bytes(pictures_among(tensors).data) == frames.read_bytes()
    say(what="stages", s=round(total, 2), host_peak=host_peak(), equal=equal)


if __name__ == "__main__":
    what, where = sys.argv[1:]
    (plain if what == "plain" else stages)(Path(where), Path(where).with_suffix(".raw"))

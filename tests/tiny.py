"""Tiny pipelines with random weights in the standard layout, made in a second; and their plain diffusers pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "red", "blue", "circle", "star", "small", "large", "at", "the", "top", "left", "and", "blurry")
SIZE = 32


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -10.0, "▁": -4.0} | {f"▁{word}": -2.0 for word in WORDS}
    pieces |= {chr(c): -8.0 for c in range(33, 127) if chr(c) not in pieces}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def clip(projection: bool = False, layers: int = 2, width: int = 32) -> Any:
    size = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=layers,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(layers: int = 2) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=SIZE,
        shift_factor=0.1,
        scaling_factor=0.4,
        **settings,
    ).eval()


def flux(guidance_embeds: bool = True, depth: int = 1) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=depth,
        num_single_layers=2 * depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer.eval(),
    )


def flux_forward(module: torch.nn.Module, device: str) -> torch.Tensor:
    """A forward of a tiny FluxTransformer2DModel with guidance."""
    generator = torch.Generator().manual_seed(1)
    return module(
        hidden_states=torch.randn(1, 16, 16, generator=generator).to(device),
        encoder_hidden_states=torch.randn(1, 8, 32, generator=generator).to(device),
        pooled_projections=torch.randn(1, 32, generator=generator).to(device),
        timestep=torch.tensor([0.5], device=device),
        guidance=torch.tensor([3.5], device=device),
        img_ids=torch.zeros(16, 3, device=device),
        txt_ids=torch.zeros(8, 3, device=device),
    ).sample


def sd15() -> StableDiffusionPipeline:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=SIZE // 2,
        norm_num_groups=4,
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(second: int = 32) -> StableDiffusionXLPipeline:
    """`second` is the width of its second text encoder."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=SIZE // 2,
        norm_num_groups=4,
        cross_attention_dim=32 + second,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=48 + second,
    )
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True, width=second),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


def sdxl_refiner(second: int = 32, aesthetics: bool = True) -> Any:
    """A refiner for `sdxl`, with a denoiser and a scheduler of its own."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel

    torch.manual_seed(5)
    config = dict(sdxl(second).unet.config)
    size = (5 if aesthetics else 6) * config["addition_time_embed_dim"] + second
    unet = UNet2DConditionModel.from_config(
        {**config, "cross_attention_dim": second, "projection_class_embeddings_input_dim": size}
    )
    parts = sdxl(second).components
    return StableDiffusionXLImg2ImgPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder_2", "tokenizer_2")}, text_encoder=None, tokenizer=None,
        unet=unet.eval(), scheduler=EulerDiscreteScheduler(steps_offset=1, use_karras_sigmas=True),
        requires_aesthetics_score=aesthetics, force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


def sd3(depth: int = 2) -> StableDiffusion3Pipeline:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        num_layers=depth,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=24,
    )
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=64,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=4,
            tie_word_embeddings=False,
        )
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder,
        tokenizer_3=t5_tokenizer(),
    )


def chroma(depth: int = 1) -> DiffusionPipeline:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=depth,
        num_single_layers=depth,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )


def pixart(depth: int = 1) -> DiffusionPipeline:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,  # one of those that its pipeline knows
        num_layers=depth,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
    )
    return PixArtSigmaPipeline(
        transformer=transformer.eval(),
        vae=vae(),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def save(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def plain(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **arguments: Any) -> torch.Tensor:
    """Pictures of the plain pipeline in one process, uint8 (n, height, width, 3)."""
    return picture_of(DiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device), **arguments)


def picture_of(pipeline: DiffusionPipeline, **arguments: Any) -> torch.Tensor:
    """Pictures of a plain pipeline, uint8 (n, height, width, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    seed = arguments.pop("seed")
    images = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(seed)).images
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def needs_gpus(count: int) -> pytest.MarkDecorator:
    """Tests of what only a GPU can show; the logic behind it is tested on the CPU, too."""
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} CUDA GPU(s)")


def environment() -> dict[str, str]:
    """For processes that a test starts: offline, and quick to give up on a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}

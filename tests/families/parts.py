"""Tiny components that pipelines of several families take."""

from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel

from tests import tiny, tiny_families


def vae8(**settings: Any) -> Any:
    """A VAE of the usual scale, 8 pixels a latent."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, layers_per_block=1, **settings,
    ).eval()  # fmt: skip


def unet(channels: int, **settings: Any) -> UNet2DConditionModel:
    """The UNet of `tiny.sd15`, for other inputs."""
    return UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=tiny.SIZE // 2, norm_num_groups=4,
        cross_attention_dim=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), in_channels=channels,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **settings,
    ).eval()  # fmt: skip


def motion_adapter(**settings: Any) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4,
        **settings,
    ).eval()  # fmt: skip


def gemma2() -> Any:
    config = Gemma2Config(
        head_dim=16, hidden_size=32, intermediate_size=37, num_attention_heads=2, num_hidden_layers=2,
        num_key_value_heads=2, vocab_size=len(tiny_families.qwen_tokenizer()), sliding_window=64, pad_token_id=0,
    )  # fmt: skip
    return Gemma2Model(config).eval()


def llama(cls: Any = LlamaModel, hidden: int = 16) -> Any:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, pad_token_id=0,
        vocab_size=len(tiny_families.qwen_tokenizer()),
    )  # fmt: skip
    return cls(config).eval()


def padded_tokenizer() -> Any:
    tokenizer = tiny_families.qwen_tokenizer()
    tokenizer.padding_side = "right"
    return tokenizer


def ddim() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False)


def sure(vae: Any) -> Any:
    """A VAE that leaves nothing to chance, for pipelines that sample its latents without the job's seed.

    Its means are so large that its deviations, e^-15, are lost in rounding.
    """
    half = vae.quant_conv.weight.shape[0] // 2
    with torch.no_grad():
        vae.quant_conv.bias[:half] += 64
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = -30  # the logarithm of a variance
    return vae

"""Pipelines that make videos."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests import tiny, tiny_videos
from tests.families.case import Case, Make, of, plain
from tests.families.parts import ddim, motion_adapter, unet


def hunyuan_video() -> DiffusionPipeline:
    torch.manual_seed(0)
    base = tiny_videos.framepack().components
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae", "scheduler")
    return diffusers.HunyuanVideoPipeline(**{n: base[n] for n in names}, transformer=transformer.eval())


def skyreels_i2v() -> Make:
    def transformer() -> Any:
        return diffusers.HunyuanVideoTransformer3DModel(
            in_channels=8, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
            text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
        ).eval()  # fmt: skip

    return of("HunyuanSkyreelsImageToVideoPipeline", hunyuan_video, transformer=transformer)


def allegro() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=8, caption_channels=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    vae.enable_tiling()
    return diffusers.AllegroPipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=diffusers.DDIMScheduler(), text_encoder=tiny.t5(),
        tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def latte() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    return diffusers.LattePipeline(
        transformer=transformer.eval(), vae=tiny.vae(), scheduler=diffusers.DDIMScheduler(), text_encoder=tiny.t5(),
        tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def mochi() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, out_channels=None, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4,
        activation_fn="swiglu", max_sequence_length=16,
    )  # fmt: skip
    transformer.pos_frequencies.data = transformer.pos_frequencies.new_full(transformer.pos_frequencies.shape, 0)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny.t5(), tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def wan_like(name: str, transformer: str, scheduler: Callable[[], Any] | None = None, **settings: Any) -> Make:
    def model() -> Any:
        common = {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
            "out_channels": 16, "text_dim": 32, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "cross_attn_norm": True, "rope_max_seq_len": 32,
        }  # fmt: skip
        return getattr(diffusers, transformer)(**{**common, **settings}).eval()

    changes: dict[str, Any] = {"transformer": model}
    if scheduler:
        changes["scheduler"] = scheduler
    return of(name, tiny_videos.wan_of_image if settings.get("image_dim") else tiny_videos.wan, **changes)


def cogvideox_transformer(channels: int) -> Any:
    config = {**plain(tiny_videos.cogvideox().transformer), "in_channels": channels, "out_channels": 4}
    return diffusers.CogVideoXTransformer3DModel.from_config(config).eval()


def sdxl_motion_adapter() -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4,
        use_motion_mid_block=False,
    ).eval()  # fmt: skip


def unet3d() -> Any:
    return diffusers.UNet3DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4,
    ).eval()  # fmt: skip


VIDEO = 9
CASES: dict[str, Case] = {
    "WanPipeline": Case(lambda: tiny_videos.wan(experts=2), frames=VIDEO),
    "WanImageToVideoPipeline": Case(tiny_videos.wan_of_image, "i", VIDEO),
    "WanVACEPipeline": Case(
        wan_like(
            "WanVACEPipeline",
            "WanVACETransformer3DModel",
            num_layers=3,
            vace_layers=[0, 2],
            vace_in_channels=96,
            qk_norm="rms_norm_across_heads",
        ),
        frames=VIDEO,
    ),
    "ChronoEditPipeline": Case(
        wan_like(
            "ChronoEditPipeline",
            "ChronoEditTransformer3DModel",
            in_channels=36,
            image_dim=32,
            qk_norm="rms_norm_across_heads",
        ),
        "i",
        VIDEO,
    ),
    "AnyFlowPipeline": Case(
        wan_like(
            "AnyFlowPipeline",
            "AnyFlowTransformer3DModel",
            lambda: diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
            gate_value=0.25,
            deltatime_type="r",
        ),
        frames=VIDEO,
    ),
    "SkyReelsV2Pipeline": Case(
        wan_like("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", qk_norm="rms_norm_across_heads"), frames=VIDEO
    ),
    "SkyReelsV2DiffusionForcingPipeline": Case(
        wan_like("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel", qk_norm="rms_norm_across_heads"),
        frames=VIDEO,
    ),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": Case(
        wan_like(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2Transformer3DModel",
            qk_norm="rms_norm_across_heads",
        ),
        "i",
        VIDEO,
    ),
    "LTXPipeline": Case(tiny_videos.ltx, frames=VIDEO),
    "LTXImageToVideoPipeline": Case(of("LTXImageToVideoPipeline", tiny_videos.ltx), "i", VIDEO),
    "LTXConditionPipeline": Case(of("LTXConditionPipeline", tiny_videos.ltx), "i", VIDEO),
    "LTX2Pipeline": Case(tiny_videos.ltx2, frames=VIDEO),
    "LTX2ImageToVideoPipeline": Case(of("LTX2ImageToVideoPipeline", tiny_videos.ltx2), "i", VIDEO),
    "LTX2ConditionPipeline": Case(of("LTX2ConditionPipeline", tiny_videos.ltx2), "", VIDEO),
    "CogVideoXPipeline": Case(tiny_videos.cogvideox, frames=VIDEO),
    "AnimateDiffPipeline": Case(tiny_videos.animatediff, frames=20),
    "AnimateDiffPAGPipeline": Case(
        of("AnimateDiffPAGPipeline", tiny_videos.animatediff, unet=lambda: unet(4), motion_adapter=motion_adapter),
        frames=8,
    ),
    "HunyuanVideoPipeline": Case(hunyuan_video, frames=VIDEO),
    "HunyuanSkyreelsImageToVideoPipeline": Case(skyreels_i2v(), "i", VIDEO),
    "HunyuanVideoFramepackPipeline": Case(tiny_videos.framepack, "i", 57),
    "AllegroPipeline": Case(allegro, frames=8, tiled=True),
    "LattePipeline": Case(latte, frames=16),
    "MochiPipeline": Case(mochi, frames=7),
    "CogVideoXImageToVideoPipeline": Case(
        of("CogVideoXImageToVideoPipeline", tiny_videos.cogvideox, transformer=lambda: cogvideox_transformer(8)),
        "i",
        VIDEO,
    ),
    "SkyReelsV2ImageToVideoPipeline": Case(
        wan_like(
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2Transformer3DModel",
            in_channels=36,
            image_dim=32,
            qk_norm="rms_norm_across_heads",
        ),
        "i",
        VIDEO,
    ),
    "AnimateDiffSDXLPipeline": Case(
        of("AnimateDiffSDXLPipeline", tiny.sdxl, motion_adapter=lambda: sdxl_motion_adapter(), scheduler=ddim), frames=8
    ),
    "PIAPipeline": Case(
        of(
            "PIAPipeline",
            tiny.sd15,
            unet=lambda: unet(4),
            motion_adapter=lambda: motion_adapter(conv_in_channels=9),
            scheduler=ddim,
        ),
        "i",
        8,
    ),
    "TextToVideoSDPipeline": Case(
        of("TextToVideoSDPipeline", tiny.sd15, unet=lambda: unet3d(), scheduler=ddim), frames=4
    ),
}

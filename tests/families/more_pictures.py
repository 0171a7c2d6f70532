"""More pipelines that make pictures."""

from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from tests import tiny, tiny_families
from tests.families import pictures
from tests.families.case import Case, of
from tests.families.parts import unet, vae8


def union_controlnet() -> Any:
    return diffusers.ControlNetUnionModel.from_unet(
        tiny.sdxl().unet, conditioning_embedding_out_channels=(16, 32)
    ).eval()


def z_image_controlnet(channels: int) -> Any:
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    ).eval()  # fmt: skip


def sd3_inpaint_transformer() -> Any:
    return pictures.sd3_transformer(33)


def hunyuan_dit_controlnet() -> Any:
    return diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16, transformer_num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    ).eval()  # fmt: skip


def floyd(channels: int = 3, **settings: Any) -> Any:
    """A UNet of DeepFloyd IF, over pixels."""
    return UNet2DConditionModel(
        sample_size=32, layers_per_block=1, block_out_channels=[32, 64], in_channels=channels, out_channels=6,
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], encoder_hid_dim=32,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=32, attention_head_dim=8,
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"], addition_embed_type="text",
        addition_embed_type_num_heads=2, cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift",
        act_fn="gelu", **settings,
    ).eval()  # fmt: skip


def if_parts(fine: bool = False) -> dict[str, Any]:
    """The components of DeepFloyd IF; `fine`, of its super-resolution."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0,
        variance_type="learned_range",
    )  # fmt: skip
    parts = {
        "text_encoder": tiny.t5(), "tokenizer": tiny.t5_tokenizer(), "scheduler": scheduler, "watermarker": None,
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    if not fine:
        return parts | {"unet": floyd()}
    embedding = {"class_embed_type": "timestep", "mid_block_scale_factor": 1.414, "time_embedding_act_fn": "gelu"}
    return parts | {
        "unet": floyd(6, **embedding, time_embedding_dim=32),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }


def floyd_of(name: str) -> Any:
    """A pipeline class of DeepFloyd IF, made when it is called."""

    def make() -> DiffusionPipeline:
        pipeline: DiffusionPipeline = getattr(diffusers, name)(**if_parts("SuperResolution" in name))
        return pipeline

    return make


def latent_upscale() -> DiffusionPipeline:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        act_fn="gelu", attention_head_dim=8, norm_num_groups=None, block_out_channels=[32, 32, 64, 64],
        time_cond_proj_dim=160, conv_in_kernel=1, conv_out_kernel=1, cross_attention_dim=32, in_channels=8,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3), mid_block_type=None, out_channels=5,
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"), only_cross_attention=False,
        resnet_time_scale_shift="scale_shift", time_embedding_type="fourier", timestep_post_act="gelu",
    )  # fmt: skip
    return diffusers.StableDiffusionLatentUpscalePipeline(
        unet=model.eval(), vae=vae8(), scheduler=diffusers.EulerDiscreteScheduler(prediction_type="sample"),
        text_encoder=tiny.clip(), tokenizer=tiny.clip_tokenizer(),
    )  # fmt: skip


def ldm() -> DiffusionPipeline:
    parts = tiny.sd15().components
    return diffusers.LDMTextToImagePipeline(
        vqvae=tiny.vae(), bert=parts["text_encoder"], tokenizer=parts["tokenizer"], unet=parts["unet"],
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "StableDiffusionXLControlNetUnionPipeline": Case(
        of("StableDiffusionXLControlNetUnionPipeline", tiny.sdxl, controlnet=union_controlnet),
        "c",
        settings={"control_mode": 0},
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case(
        of("StableDiffusionXLControlNetUnionImg2ImgPipeline", tiny.sdxl, controlnet=union_controlnet),
        "ic",
        settings={"control_mode": 0},
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Case(
        of("StableDiffusionXLControlNetUnionInpaintPipeline", tiny.sdxl, controlnet=union_controlnet),
        "imc",
        settings={"control_mode": 0},
    ),
    "ZImageControlNetPipeline": Case(
        of("ZImageControlNetPipeline", tiny_families.z_image, controlnet=lambda: z_image_controlnet(16)), "c"
    ),
    "ZImageControlNetInpaintPipeline": Case(
        of("ZImageControlNetInpaintPipeline", tiny_families.z_image, controlnet=lambda: z_image_controlnet(33)), "imc"
    ),
    "QwenImageControlNetInpaintPipeline": Case(
        of(
            "QwenImageControlNetInpaintPipeline",
            tiny_families.qwen_image,
            controlnet=lambda: pictures.qwen_controlnet(extra=4),
        ),
        "c",
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Case(
        of("StableDiffusion3ControlNetInpaintingPipeline", tiny.sd3, controlnet=pictures.sd3_controlnet), "c"
    ),
    "HunyuanDiTControlNetPipeline": Case(
        of("HunyuanDiTControlNetPipeline", pictures.hunyuan_dit, controlnet=hunyuan_dit_controlnet), "c"
    ),
    "IFPipeline": Case(floyd_of("IFPipeline")),
    "IFImg2ImgPipeline": Case(floyd_of("IFImg2ImgPipeline"), "i"),
    "IFInpaintingPipeline": Case(floyd_of("IFInpaintingPipeline"), "im"),
    "IFSuperResolutionPipeline": Case(floyd_of("IFSuperResolutionPipeline"), "i"),
    "StableDiffusionLatentUpscalePipeline": Case(latent_upscale, "i"),
    "LDMTextToImagePipeline": Case(ldm),
    "StableDiffusionParadigmsPipeline": Case(
        of("StableDiffusionParadigmsPipeline", tiny.sd15, scheduler=diffusers.DDIMParallelScheduler)
    ),
}

TROUBLE: dict[str, Case] = {}

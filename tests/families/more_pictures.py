"""More pipelines that make pictures."""

from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.deepfloyd_if import IFSafetyChecker, IFWatermarker
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    GemmaConfig,
    GemmaForCausalLM,
)

from tests import tiny, tiny_families
from tests.families import pictures
from tests.families.case import Case, awake, of, plain
from tests.families.parts import sure, unet, vae8


def union_controlnet() -> Any:
    config = plain(diffusers.ControlNetUnionModel.from_unet(tiny.sdxl().unet))
    sizes = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    config |= {"conditioning_embedding_out_channels": (16, 4), **sizes}
    return awake(diffusers.ControlNetUnionModel.from_config(config))


def z_image_controlnet(channels: int) -> Any:
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner", dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    return awake(model)


def z_image_controlled(name: str, channels: int) -> Any:
    """A pipeline of Z-Image with a ControlNet, whose folder has the weights that are the ControlNet's own."""

    def make() -> DiffusionPipeline:
        pipeline = of(name, tiny_families.z_image, controlnet=lambda: z_image_controlnet(channels))()
        pipeline.controlnet = z_image_controlnet(channels)  # without the modules that it shares with the transformer
        return pipeline

    return make


def hunyuan_dit_controlnet() -> Any:
    model = diffusers.HunyuanDiT2DControlNetModel(
        sample_size=16, transformer_num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    return awake(model)


def hunyuan_dit_of_four_layers() -> Any:
    """Enough of them that its ControlNet has one."""
    config = {**plain(pictures.hunyuan_dit().transformer), "num_layers": 4}
    return diffusers.HunyuanDiT2DModel.from_config(config).eval()


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
        "text_encoder": tiny.t5(), "tokenizer": tiny.t5_tokenizer(), "scheduler": scheduler,
        "watermarker": IFWatermarker(), "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
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


def safe_floyd() -> DiffusionPipeline:
    """DeepFloyd IF with its safety checker, as it is published."""
    parts = if_parts() | {"feature_extractor": CLIPImageProcessorPil(size=30, crop_size=30)}
    size = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "projection_dim": 32}
    vision = {**size, "num_hidden_layers": 2, "image_size": 30, "patch_size": 15}
    config = CLIPConfig(vision_config=vision, text_config={**size, "num_hidden_layers": 1}, projection_dim=32)
    return diffusers.IFPipeline(**parts | {"safety_checker": IFSafetyChecker(config).eval()})


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


def deeper(base: UNet2DConditionModel) -> Any:
    """A UNet of two layers a block, as ControlNet-XS has them."""
    return UNet2DConditionModel.from_config({**plain(base), "layers_per_block": 2}).eval()


def xs_adapter(base: UNet2DConditionModel) -> Any:
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        deeper(base), size_ratio=1, conditioning_embedding_out_channels=(2, 4)
    )
    return awake(adapter)


def lumina() -> DiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = tiny.t5_tokenizer()
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_attention_heads=2,
        num_kv_heads=2, multiple_of=16, norm_eps=1e-5, learn_sigma=True, qk_norm=True, cross_attention_dim=32,
    )  # fmt: skip
    config = GemmaConfig(
        head_dim=8, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=4, vocab_size=len(tokenizer), pad_token_id=0,
    )  # fmt: skip
    return diffusers.LuminaPipeline(
        transformer=transformer.eval(), vae=vae8(), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=GemmaForCausalLM(config).eval(), tokenizer=tokenizer,
    )  # fmt: skip


def stable_unclip() -> DiffusionPipeline:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        intermediate_size=37, patch_size=8,
    )  # fmt: skip
    parts = tiny.sd15().components
    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessorPil(size=32, crop_size=32),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32).eval(),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"], vae=parts["vae"], scheduler=DDIMScheduler(clip_sample=False),
        unet=unet(4, class_embed_type="projection", projection_class_embeddings_input_dim=64),
    )  # fmt: skip


def depth_to_image() -> DiffusionPipeline:
    torch.manual_seed(0)
    config = DPTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
        num_attention_heads=4, intermediate_size=37, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
    )  # fmt: skip
    parts = tiny.sd15().components
    return diffusers.StableDiffusionDepth2ImgPipeline(
        vae=parts["vae"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        unet=unet(5, out_channels=4), scheduler=parts["scheduler"],
        depth_estimator=DPTForDepthEstimation(config).eval(),
        feature_extractor=DPTImageProcessorPil(size={"height": 32, "width": 32}),
    )  # fmt: skip


def versatile_diffusion() -> DiffusionPipeline:
    """A pipeline whose UNet has the text's attention in it, and whose second UNet has been left away."""
    parts = tiny.sd15().components
    return diffusers.VersatileDiffusionTextToImagePipeline(
        tokenizer=parts["tokenizer"], text_encoder=tiny.clip(projection=True), image_unet=parts["unet"],
        text_unet=None, vae=parts["vae"], scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "ZImageControlNetPipeline": Case(z_image_controlled("ZImageControlNetPipeline", 16), "c"),
    "ZImageControlNetInpaintPipeline": Case(z_image_controlled("ZImageControlNetInpaintPipeline", 33), "imc"),
    "HunyuanDiTControlNetPipeline": Case(
        of(
            "HunyuanDiTControlNetPipeline",
            pictures.hunyuan_dit,
            transformer=hunyuan_dit_of_four_layers,
            controlnet=hunyuan_dit_controlnet,
            vae=lambda: sure(vae8()),
        ),
        "c",
    ),
    "IFPipeline": Case(floyd_of("IFPipeline")),
    "IFImg2ImgPipeline": Case(floyd_of("IFImg2ImgPipeline"), "i"),
    "IFInpaintingPipeline": Case(floyd_of("IFInpaintingPipeline"), "im"),
    "IFSuperResolutionPipeline": Case(floyd_of("IFSuperResolutionPipeline"), "i"),
    "StableDiffusionLatentUpscalePipeline": Case(latent_upscale, "i", size=64),
    "StableDiffusionControlNetXSPipeline": Case(
        of(
            "StableDiffusionControlNetXSPipeline",
            tiny.sd15,
            unet=lambda: deeper(tiny.sd15().unet),
            controlnet=lambda: xs_adapter(tiny.sd15().unet),
        ),
        "c",
    ),
    "StableDiffusionXLControlNetXSPipeline": Case(
        of(
            "StableDiffusionXLControlNetXSPipeline",
            tiny.sdxl,
            unet=lambda: deeper(tiny.sdxl().unet),
            controlnet=lambda: xs_adapter(tiny.sdxl().unet),
        ),
        "c",
    ),
    "LuminaPipeline": Case(lumina),
    "LDMTextToImagePipeline": Case(ldm),
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
    "QwenImageControlNetInpaintPipeline": Case(
        of(
            "QwenImageControlNetInpaintPipeline",
            tiny_families.qwen_image,
            controlnet=lambda: awake(pictures.qwen_controlnet(extra=4)),
            vae=lambda: sure(tiny_families.qwen_image().vae),
        ),
        "mc",
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": Case(
        of(
            "StableDiffusion3ControlNetInpaintingPipeline",
            tiny.sd3,
            controlnet=lambda: awake(pictures.sd3_controlnet(extra=1)),
            vae=lambda: sure(tiny.vae()),
        ),
        "mc",
    ),
    "StableUnCLIPImg2ImgPipeline": Case(stable_unclip, "i"),
    "StableDiffusionDepth2ImgPipeline": Case(depth_to_image, "i"),
    "VersatileDiffusionTextToImagePipeline": Case(versatile_diffusion),
}

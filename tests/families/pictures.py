"""Pipelines that make pictures."""

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from transformers import LlamaForCausalLM

from tests import tiny, tiny_families, tiny_videos
from tests.families.case import Case, awake, of, plain
from tests.families.parts import ddim, gemma2, llama, padded_tokenizer, sure, unet, vae8


def controlnet(**settings: Any) -> Any:
    return diffusers.ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(2, 4),
        **settings,
    ).eval()  # fmt: skip


def sdxl_controlnet() -> Any:
    return diffusers.ControlNetModel.from_unet(tiny.sdxl().unet, conditioning_embedding_out_channels=(2, 4)).eval()


def sdxl_unet(channels: int) -> Any:
    return UNet2DConditionModel.from_config({**plain(tiny.sdxl().unet), "in_channels": channels}).eval()


def attentive_unet() -> Any:
    """A UNet whose first block attends, as an adapter needs it: it adds to that block's inside."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel.from_config({**plain(tiny.sd15().unet), **blocks}).eval()


def flux_transformer(channels: int, **settings: Any) -> Any:
    config = {**plain(tiny.flux().transformer), "in_channels": channels, "out_channels": 16, **settings}
    return diffusers.FluxTransformer2DModel.from_config(config).eval()


def flux_controlnet() -> Any:
    model = diffusers.FluxControlNetModel.from_transformer(
        tiny.flux().transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return model.eval()


def sd3_transformer(channels: int, out: int = 4) -> Any:
    config = {**plain(tiny.sd3().transformer), "in_channels": channels, "out_channels": out}
    return diffusers.SD3Transformer2DModel.from_config(config).eval()


def sd3_controlnet(extra: int = 0) -> Any:
    return diffusers.SD3ControlNetModel.from_transformer(
        tiny.sd3().transformer, num_layers=1, num_extra_conditioning_channels=extra
    ).eval()


def sana() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=32,
        sample_size=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=padded_tokenizer(), text_encoder=gemma2(), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def sana_sprint() -> DiffusionPipeline:
    parts = sana().components
    config = {**plain(parts["transformer"]), "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    transformer = diffusers.SanaTransformer2DModel.from_config(config).eval()
    return diffusers.SanaSprintPipeline(**parts | {"transformer": transformer, "scheduler": diffusers.SCMScheduler()})


def lumina2() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5, scaling_factor=1.0, axes_dim_rope=[4, 2, 2],
        cap_feat_dim=32,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(),
        text_encoder=gemma2(), tokenizer=padded_tokenizer(),
    )  # fmt: skip


def aura_flow() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(),
        text_encoder=tiny_videos.umt5(), tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def pixart_alpha() -> DiffusionPipeline:
    parts = tiny.pixart().components
    return diffusers.PixArtAlphaPipeline(**parts)


def cogview4() -> DiffusionPipeline:
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    tokenizer = tiny.t5_tokenizer()
    config = GlmConfig(
        hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=0,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return diffusers.CogView4Pipeline(
        transformer=transformer.eval(), scheduler=scheduler, vae=tiny.vae(), text_encoder=GlmModel(config).eval(),
        tokenizer=tokenizer,
    )  # fmt: skip


def cogview3() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return diffusers.CogView3PlusPipeline(
        transformer=transformer.eval(), scheduler=diffusers.CogVideoXDDIMScheduler(), vae=tiny.vae(),
        text_encoder=tiny.t5(), tokenizer=tiny.t5_tokenizer(),
    )  # fmt: skip


def hunyuan_dit() -> DiffusionPipeline:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    size = len(tiny_families.qwen_tokenizer())
    bert = BertConfig(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=size)
    return diffusers.HunyuanDiTPipeline(
        transformer=transformer.eval(), vae=vae8(), scheduler=diffusers.DDPMScheduler(),
        text_encoder=BertModel(bert).eval(), tokenizer=tiny_families.qwen_tokenizer(), text_encoder_2=tiny.t5(),
        tokenizer_2=tiny.t5_tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def krea2() -> DiffusionPipeline:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(0)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    tokenizer = tiny_families.qwen_tokenizer()
    config = Qwen3VLConfig(
        text_config={**tiny_families.QWEN, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": len(tokenizer)},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=tiny_families.qwen_image().vae, text_encoder=Qwen3VLModel(config).eval(), tokenizer=tokenizer,
        transformer=transformer.eval(), text_encoder_select_layers=(0, 1, 2),
    )  # fmt: skip


def long_clip() -> Any:
    """A CLIP of 128 positions."""
    from transformers import CLIPTextModelWithProjection

    config = tiny.clip(projection=True).config
    config.max_position_embeddings = 128
    return CLIPTextModelWithProjection(config).eval()


def hidream() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip
    tokenizer = tiny_families.qwen_tokenizer()
    return diffusers.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(), text_encoder=long_clip(),
        tokenizer=tiny.clip_tokenizer(), text_encoder_2=long_clip(), tokenizer_2=tiny.clip_tokenizer(),
        text_encoder_3=tiny.t5(), tokenizer_3=tiny.t5_tokenizer(), text_encoder_4=llama(LlamaForCausalLM),
        tokenizer_4=tokenizer, transformer=transformer.eval(),
    )  # fmt: skip


def kandinsky3() -> DiffusionPipeline:
    torch.manual_seed(0)
    unet3 = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        out_channels=3, up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], vq_embed_dim=4,
    )  # fmt: skip
    return diffusers.Kandinsky3Pipeline(
        tokenizer=tiny.t5_tokenizer(), text_encoder=tiny.t5(), unet=unet3.eval(), movq=movq.eval(),
        scheduler=diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.02, steps_offset=1, beta_schedule="squaredcos_cap_v2", clip_sample=True,
            thresholding=False,
        ),
    )  # fmt: skip


def bria() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return diffusers.BriaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=tiny.t5(), tokenizer=tiny.t5_tokenizer(),
        transformer=transformer.eval(), vae=tiny.vae(), image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def amused() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.UVit2DModel(
        hidden_size=32, use_bias=False, hidden_dropout=0.0, cond_embed_dim=32, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=32, vocab_size=32, codebook_size=32, in_channels=32,
        block_out_channels=32, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
        num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0, intermediate_size=32, layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        act_fn="silu", block_out_channels=[8], down_block_types=["DownEncoderBlock2D"], in_channels=3,
        latent_channels=8, layers_per_block=1, norm_num_groups=8, num_vq_embeddings=32, out_channels=3, sample_size=8,
        up_block_types=["UpDecoderBlock2D"], mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    return diffusers.AmusedPipeline(
        transformer=transformer.eval(), scheduler=diffusers.AmusedScheduler(mask_token_id=31), vqvae=vqvae.eval(),
        text_encoder=tiny.clip(projection=True), tokenizer=tiny.clip_tokenizer(),
    )  # fmt: skip


def chroma_inpaint() -> DiffusionPipeline:
    pipeline = of("ChromaInpaintPipeline", tiny.chroma)()
    pipeline.transformer.register_to_config(guidance_embeds=False)  # which it asks for, and no Chroma has
    return pipeline


def sana_controlnet() -> Any:
    return diffusers.SanaControlNetModel(
        patch_size=1, in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=32,
        sample_size=32,
    ).eval()  # fmt: skip


def qwen_controlnet(extra: int = 0) -> Any:
    return diffusers.QwenImageControlNetModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), extra_condition_channels=extra,
    ).eval()  # fmt: skip


def cogview4_transformer(channels: int) -> Any:
    config = {**plain(cogview4().transformer), "in_channels": channels, "out_channels": 4}
    return diffusers.CogView4Transformer2DModel.from_config(config).eval()


CASES: dict[str, Case] = {
    "StableDiffusionPipeline": Case(tiny.sd15),
    "StableDiffusionImg2ImgPipeline": Case(of("StableDiffusionImg2ImgPipeline", tiny.sd15), "i"),
    "StableDiffusionInpaintPipeline": Case(of("StableDiffusionInpaintPipeline", tiny.sd15), "im"),
    "StableDiffusionInstructPix2PixPipeline": Case(
        of("StableDiffusionInstructPix2PixPipeline", tiny.sd15, unet=lambda: unet(8, out_channels=4)), "i"
    ),
    "StableDiffusionUpscalePipeline": Case(
        of(
            "StableDiffusionUpscalePipeline",
            tiny.sd15,
            low_res_scheduler=diffusers.DDPMScheduler,
            unet=lambda: unet(7, out_channels=4, num_class_embeds=1000),
        ),
        "i",
    ),
    "StableDiffusionControlNetPipeline": Case(
        of("StableDiffusionControlNetPipeline", tiny.sd15, controlnet=controlnet), "c"
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Case(
        of("StableDiffusionControlNetImg2ImgPipeline", tiny.sd15, controlnet=controlnet), "ic"
    ),
    "StableDiffusionControlNetInpaintPipeline": Case(
        of("StableDiffusionControlNetInpaintPipeline", tiny.sd15, controlnet=controlnet), "imc"
    ),
    "StableDiffusionPAGPipeline": Case(of("StableDiffusionPAGPipeline", tiny.sd15)),
    "StableDiffusionPAGImg2ImgPipeline": Case(of("StableDiffusionPAGImg2ImgPipeline", tiny.sd15), "i"),
    "StableDiffusionPAGInpaintPipeline": Case(of("StableDiffusionPAGInpaintPipeline", tiny.sd15), "im"),
    "StableDiffusionControlNetPAGPipeline": Case(
        of("StableDiffusionControlNetPAGPipeline", tiny.sd15, controlnet=controlnet), "c"
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": Case(
        of("StableDiffusionControlNetPAGInpaintPipeline", tiny.sd15, controlnet=controlnet), "imc"
    ),
    "StableDiffusionPanoramaPipeline": Case(of("StableDiffusionPanoramaPipeline", tiny.sd15, scheduler=ddim)),
    "StableDiffusionLDM3DPipeline": Case(
        of("StableDiffusionLDM3DPipeline", tiny.sd15, vae=lambda: tiny.vae(in_channels=6, out_channels=6))
    ),
    "StableDiffusionModelEditingPipeline": Case(of("StableDiffusionModelEditingPipeline", tiny.sd15)),
    "SemanticStableDiffusionPipeline": Case(of("SemanticStableDiffusionPipeline", tiny.sd15)),
    "LatentConsistencyModelPipeline": Case(
        of(
            "LatentConsistencyModelPipeline",
            tiny.sd15,
            scheduler=diffusers.LCMScheduler,
            unet=lambda: unet(4, time_cond_proj_dim=32),
        )
    ),
    "LatentConsistencyModelImg2ImgPipeline": Case(
        of(
            "LatentConsistencyModelImg2ImgPipeline",
            tiny.sd15,
            scheduler=diffusers.LCMScheduler,
            unet=lambda: unet(4, time_cond_proj_dim=32),
        ),
        "i",
    ),
    "StableDiffusionAdapterPipeline": Case(
        of(
            "StableDiffusionAdapterPipeline",
            tiny.sd15,
            unet=attentive_unet,
            adapter=lambda: diffusers.T2IAdapter(
                in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=2
            ).eval(),
        ),
        "c",
    ),
    "StableDiffusionXLPipeline": Case(tiny.sdxl),
    "StableDiffusionXLImg2ImgPipeline": Case(of("StableDiffusionXLImg2ImgPipeline", tiny.sdxl), "i"),
    "StableDiffusionXLInpaintPipeline": Case(of("StableDiffusionXLInpaintPipeline", tiny.sdxl), "im"),
    "StableDiffusionXLInstructPix2PixPipeline": Case(
        of("StableDiffusionXLInstructPix2PixPipeline", tiny.sdxl, unet=lambda: sdxl_unet(8)), "i"
    ),
    "StableDiffusionXLControlNetPipeline": Case(
        of("StableDiffusionXLControlNetPipeline", tiny.sdxl, controlnet=sdxl_controlnet), "c"
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(
        of("StableDiffusionXLControlNetImg2ImgPipeline", tiny.sdxl, controlnet=sdxl_controlnet), "ic"
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Case(
        of("StableDiffusionXLControlNetInpaintPipeline", tiny.sdxl, controlnet=sdxl_controlnet), "imc"
    ),
    "StableDiffusionXLPAGPipeline": Case(of("StableDiffusionXLPAGPipeline", tiny.sdxl)),
    "StableDiffusionXLPAGImg2ImgPipeline": Case(of("StableDiffusionXLPAGImg2ImgPipeline", tiny.sdxl), "i"),
    "StableDiffusionXLPAGInpaintPipeline": Case(of("StableDiffusionXLPAGInpaintPipeline", tiny.sdxl), "im"),
    "StableDiffusionXLControlNetPAGPipeline": Case(
        of("StableDiffusionXLControlNetPAGPipeline", tiny.sdxl, controlnet=sdxl_controlnet), "c"
    ),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(
        of("StableDiffusionXLControlNetPAGImg2ImgPipeline", tiny.sdxl, controlnet=sdxl_controlnet), "ic"
    ),
    "StableDiffusion3Pipeline": Case(tiny.sd3),
    "StableDiffusion3Img2ImgPipeline": Case(of("StableDiffusion3Img2ImgPipeline", tiny.sd3), "i"),
    "StableDiffusion3PAGPipeline": Case(of("StableDiffusion3PAGPipeline", tiny.sd3), settings={}),
    "StableDiffusion3PAGImg2ImgPipeline": Case(of("StableDiffusion3PAGImg2ImgPipeline", tiny.sd3), "i"),
    "StableDiffusion3InpaintPipeline": Case(
        of(
            "StableDiffusion3InpaintPipeline",
            tiny.sd3,
            transformer=lambda: sd3_transformer(16, out=16),
            vae=lambda: tiny.vae(latent_channels=16),
        ),
        "im",
    ),
    "StableDiffusion3ControlNetPipeline": Case(
        of(
            "StableDiffusion3ControlNetPipeline",
            tiny.sd3,
            controlnet=lambda: awake(sd3_controlnet()),
            vae=lambda: sure(tiny.vae()),
        ),
        "c",
    ),
    "FluxPipeline": Case(tiny.flux),
    "FluxImg2ImgPipeline": Case(of("FluxImg2ImgPipeline", tiny.flux), "i"),
    "FluxInpaintPipeline": Case(of("FluxInpaintPipeline", tiny.flux), "im"),
    "FluxFillPipeline": Case(of("FluxFillPipeline", tiny.flux, transformer=lambda: flux_transformer(48)), "im"),
    "FluxKontextPipeline": Case(
        of("FluxKontextPipeline", tiny.flux), "i", settings={"max_area": 1024, "_auto_resize": False}
    ),
    "FluxKontextInpaintPipeline": Case(
        of("FluxKontextInpaintPipeline", tiny.flux), "im", settings={"max_area": 1024, "_auto_resize": False}
    ),
    "FluxControlPipeline": Case(of("FluxControlPipeline", tiny.flux, transformer=lambda: flux_transformer(32)), "c"),
    "FluxControlImg2ImgPipeline": Case(
        of("FluxControlImg2ImgPipeline", tiny.flux, transformer=lambda: flux_transformer(32)), "ic"
    ),
    "FluxControlInpaintPipeline": Case(
        of("FluxControlInpaintPipeline", tiny.flux, transformer=lambda: flux_transformer(32)), "imc"
    ),
    "FluxControlNetPipeline": Case(of("FluxControlNetPipeline", tiny.flux, controlnet=flux_controlnet), "c"),
    "FluxControlNetImg2ImgPipeline": Case(
        of("FluxControlNetImg2ImgPipeline", tiny.flux, controlnet=flux_controlnet), "ic"
    ),
    "FluxControlNetInpaintPipeline": Case(
        of("FluxControlNetInpaintPipeline", tiny.flux, controlnet=flux_controlnet), "imc"
    ),
    "ChromaPipeline": Case(tiny.chroma),
    "ChromaImg2ImgPipeline": Case(of("ChromaImg2ImgPipeline", tiny.chroma), "i"),
    "ChromaInpaintPipeline": Case(chroma_inpaint, "im"),
    "Flux2KleinPipeline": Case(tiny_families.flux2_klein),
    "Flux2KleinInpaintPipeline": Case(of("Flux2KleinInpaintPipeline", tiny_families.flux2_klein), "im"),
    "Flux2KleinKVPipeline": Case(of("Flux2KleinKVPipeline", tiny_families.flux2_klein), "i", size=64),
    "QwenImagePipeline": Case(tiny_families.qwen_image),
    "QwenImageImg2ImgPipeline": Case(of("QwenImageImg2ImgPipeline", tiny_families.qwen_image), "i"),
    "QwenImageInpaintPipeline": Case(of("QwenImageInpaintPipeline", tiny_families.qwen_image), "im"),
    "ZImagePipeline": Case(tiny_families.z_image),
    "ZImageImg2ImgPipeline": Case(of("ZImageImg2ImgPipeline", tiny_families.z_image), "i"),
    "ZImageInpaintPipeline": Case(of("ZImageInpaintPipeline", tiny_families.z_image), "im"),
    "PixArtSigmaPipeline": Case(tiny.pixart, settings={"use_resolution_binning": False}),
    "PixArtAlphaPipeline": Case(pixart_alpha, settings={"use_resolution_binning": False}),
    "PixArtSigmaPAGPipeline": Case(
        of("PixArtSigmaPAGPipeline", lambda: tiny.pixart(depth=2)), settings={"use_resolution_binning": False}
    ),
    "SanaPipeline": Case(sana, settings={"use_resolution_binning": False}),
    "SanaPAGPipeline": Case(of("SanaPAGPipeline", sana), settings={"use_resolution_binning": False}),
    "SanaSprintPipeline": Case(sana_sprint, settings={"use_resolution_binning": False}, steps=2),
    "SanaSprintImg2ImgPipeline": Case(
        of("SanaSprintImg2ImgPipeline", sana_sprint), "i", settings={"use_resolution_binning": False}, steps=2
    ),
    "Lumina2Pipeline": Case(lumina2),
    "AuraFlowPipeline": Case(aura_flow),
    "CogView4Pipeline": Case(cogview4),
    "CogView3PlusPipeline": Case(cogview3),
    "HunyuanDiTPipeline": Case(hunyuan_dit, settings={"use_resolution_binning": False}),
    "HunyuanDiTPAGPipeline": Case(of("HunyuanDiTPAGPipeline", hunyuan_dit), settings={"use_resolution_binning": False}),
    "Krea2Pipeline": Case(krea2),
    "HiDreamImagePipeline": Case(hidream, size=128),
    "Kandinsky3Pipeline": Case(kandinsky3),
    "Kandinsky3Img2ImgPipeline": Case(of("Kandinsky3Img2ImgPipeline", kandinsky3), "i"),
    "BriaPipeline": Case(bria),
    "AmusedPipeline": Case(amused),
    "AmusedImg2ImgPipeline": Case(of("AmusedImg2ImgPipeline", amused), "i"),
    "AmusedInpaintPipeline": Case(of("AmusedInpaintPipeline", amused), "im"),
    "SanaControlNetPipeline": Case(
        of("SanaControlNetPipeline", sana, controlnet=lambda: sana_controlnet()),
        "c",
        settings={"use_resolution_binning": False},
    ),
    "QwenImageControlNetPipeline": Case(
        of("QwenImageControlNetPipeline", tiny_families.qwen_image, controlnet=lambda: qwen_controlnet()), "c"
    ),
    "CogView4ControlPipeline": Case(
        of(
            "CogView4ControlPipeline",
            cogview4,
            transformer=lambda: cogview4_transformer(8),
            vae=lambda: sure(tiny.vae()),
        ),
        "c",
    ),
    "StableDiffusionXLAdapterPipeline": Case(
        of(
            "StableDiffusionXLAdapterPipeline",
            tiny.sdxl,
            adapter=lambda: diffusers.T2IAdapter(
                in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
            ).eval(),
        ),
        "c",
    ),
}

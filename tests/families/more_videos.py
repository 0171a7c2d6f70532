"""More pipelines that make videos: those with unusual text encoders, image encoders, guiders or checkers."""

import re
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tests import tiny, tiny_families, tiny_videos
from tests.families.case import Case, Make, of
from tests.families.parts import ddim, gemma2, motion_adapter, padded_tokenizer, sure, unet
from tests.families.pictures import controlnet
from tests.families.videos import VIDEO, cogvideox_transformer, unet3d, wan_like

ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
QWEN_TEXT = {**tiny_families.QWEN, "num_hidden_layers": 2, "rope_scaling": ROPE, "rope_theta": 1e6}
QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}


def qwen2_5_vl() -> Any:
    size = len(tiny_families.qwen_tokenizer())
    config = Qwen2_5_VLConfig(text_config={**QWEN_TEXT, "vocab_size": size}, vision_config=QWEN_VISION)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def hunyuan_vae(levels: int = 4) -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels, block_out_channels=(8,) * levels, layers_per_block=1,
        norm_num_groups=4, spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip


def kandinsky5(name: str, of_image: bool = False) -> Make:
    """Kandinsky 5, with a tokenizer in the place of its processor, which doesn't work without torchvision."""

    def make() -> DiffusionPipeline:
        torch.manual_seed(0)
        transformer = diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
            model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2), visual_cond=of_image,
            attention_type="regular",
        )  # fmt: skip
        pipeline: DiffusionPipeline = getattr(diffusers, name)(
            transformer=transformer.eval(), vae=hunyuan_vae(), text_encoder=qwen2_5_vl(),
            tokenizer=tiny_families.qwen_tokenizer(), text_encoder_2=tiny.clip(), tokenizer_2=tiny.clip_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        )  # fmt: skip
        return pipeline

    return make


def siglip(size: int = 30, patch: int = 2, hidden: int = 32) -> Any:
    config = SiglipVisionConfig(
        hidden_size=hidden, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=size,
        patch_size=patch,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


def siglip_processor(size: int = 30) -> Any:
    return SiglipImageProcessorPil(size={"height": size, "width": size})


def hunyuan_video15(of_image: bool = False) -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_refiner_layers=1,
        mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=32, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=32, task_type="i2v" if of_image else "t2v",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    tokenizer = tiny_families.qwen_tokenizer()
    tokenizer_2 = ByT5Tokenizer()
    text = Qwen2_5_VLTextConfig(**QWEN_TEXT, vocab_size=len(tokenizer))
    glyphs = T5Config(vocab_size=len(tokenizer_2), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    parts = {
        "text_encoder": Qwen2_5_VLTextModel(text).eval(), "tokenizer": tokenizer, "transformer": transformer.eval(),
        "vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0), "tokenizer_2": tokenizer_2,
        "text_encoder_2": T5EncoderModel(glyphs).eval(), "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    }  # fmt: skip
    if of_image:
        eye = siglip(27, 1, 12)  # of the 729 tokens that the pipeline counts on
        pipeline: DiffusionPipeline = diffusers.HunyuanVideo15ImageToVideoPipeline(
            **parts, image_encoder=eye, feature_extractor=siglip_processor(27)
        )
        return pipeline
    return diffusers.HunyuanVideo15Pipeline(**parts)


class LetsAllPass:
    """A stand-in for the package cosmos_guardrail, whose checker is big and isn't installed here."""

    def to(self, *_: Any, **__: Any) -> "LetsAllPass":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos(name: str, channels: int, of_wan: bool = False) -> Make:
    """A Cosmos pipeline of this class; from then on in this process, those without a checker let all pass.

    Its transformer has no padding mask, which it would resize with torchvision.
    """

    def make() -> DiffusionPipeline:
        import importlib

        cls = getattr(diffusers, name)
        importlib.import_module(cls.__module__).CosmosSafetyChecker = LetsAllPass  # type: ignore[attr-defined]
        torch.manual_seed(0)
        transformer = diffusers.CosmosTransformer3DModel(
            in_channels=channels, out_channels=16 if of_wan else 4, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type="learnable",
        )  # fmt: skip
        parts: dict[str, Any] = {"text_encoder": tiny.t5(), "tokenizer": tiny.t5_tokenizer()}
        if of_wan:
            parts |= {
                "vae": tiny_videos.wan_vae(), "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
            }  # fmt: skip
        else:
            vae = diffusers.AutoencoderKLCosmos(
                latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4,
                attention_resolutions=(8,), resolution=64, num_layers=2, patch_size=4, patch_type="haar",
                scaling_factor=1.0, spatial_compression_ratio=4, temporal_compression_ratio=4,
            )  # fmt: skip
            scheduler = diffusers.EDMEulerScheduler(
                sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
                prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
            )  # fmt: skip
            parts |= {"vae": vae.eval(), "scheduler": scheduler}
        if "2_5" in name:
            parts |= {
                "text_encoder": qwen2_5_vl(), "tokenizer": tiny_families.qwen_tokenizer(),
                "scheduler": diffusers.UniPCMultistepScheduler(),
            }  # fmt: skip
        pipeline: DiffusionPipeline = cls(**parts, transformer=transformer.eval())
        return pipeline

    return make


def sana_video() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32,
        mlp_ratio=2.5, sample_size=8, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return diffusers.SanaVideoPipeline(
        tokenizer=padded_tokenizer(), text_encoder=gemma2(), vae=tiny_videos.wan_vae(),
        transformer=transformer.eval(), scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def i2vgen_xl() -> DiffusionPipeline:
    """I2VGen-XL, with a text encoder that has a `text_model`; its own class has none in this transformers."""
    torch.manual_seed(0)
    model = diffusers.models.unets.unet_i2vgen_xl.I2VGenXLUNet(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4,
        projection_dim=32,
    )  # fmt: skip
    parts = tiny.sd15().components
    return diffusers.I2VGenXLPipeline(
        vae=sure(parts["vae"]), text_encoder=tiny.clip(projection=True), tokenizer=parts["tokenizer"],
        unet=model.eval(), image_encoder=CLIPVisionModelWithProjection(vision).eval(), scheduler=ddim(),
        feature_extractor=CLIPImageProcessorPil(crop_size=32, size=32),
    )  # fmt: skip


def sparse_controlnet() -> Any:
    return diffusers.SparseControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4, conditioning_channels=3, norm_num_groups=4,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"), cross_attention_dim=32,
        conditioning_embedding_out_channels=(8, 8), use_simplified_condition_embedding=False,
    ).eval()  # fmt: skip


def hunyuan_video_of_image() -> DiffusionPipeline:
    """HunyuanVideo of a picture, whose text encoder looks at the picture, too."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=False, text_embed_dim=16,
        pooled_projection_dim=32, rope_axes_dim=(2, 4, 4), image_condition_type="latent_concat",
    )  # fmt: skip
    tokenizer = tiny_families.qwen_tokenizer()
    pieces = re.findall(r"<[^>]+>| ?\w+", str(DEFAULT_PROMPT_TEMPLATE["template"]))
    tokenizer.add_tokens(sorted(set(pieces)), special_tokens=True)  # a token for each word of the template
    size = {"hidden_size": 16, "intermediate_size": 37, "num_attention_heads": 4}
    text = LlamaConfig(**size, num_hidden_layers=3, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    vision = CLIPVisionConfig(**size, num_hidden_layers=2, image_size=24, patch_size=1)
    llava = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id, image_seq_length=576,
    )  # fmt: skip
    return diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=LlavaForConditionalGeneration(llava).eval(), tokenizer=tokenizer, transformer=transformer.eval(),
        vae=hunyuan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=tiny.clip(),
        tokenizer_2=tiny.clip_tokenizer(), image_processor=CLIPImageProcessorPil(crop_size=24, size=24),
    )  # fmt: skip


def easyanimate(channels: int = 4) -> Make:
    def make() -> DiffusionPipeline:
        torch.manual_seed(0)
        transformer = diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=2,
            text_embed_dim=16, num_layers=1, sample_width=16, sample_height=16, patch_size=2,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLMagvit(
            down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), block_out_channels=(8,) * 4,
            latent_channels=4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False,
        )  # fmt: skip
        tokenizer = tiny_families.qwen_tokenizer()
        config = Qwen2VLConfig(
            text_config={**QWEN_TEXT, "vocab_size": len(tokenizer)},
            vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        )
        return diffusers.EasyAnimatePipeline(
            vae=vae.eval(), text_encoder=Qwen2VLForConditionalGeneration(config).eval(), tokenizer=tokenizer,
            transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip

    return make


def motif_video() -> DiffusionPipeline:
    from transformers import T5Gemma2EncoderConfig, T5Gemma2TextConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

    torch.manual_seed(0)
    tokenizer = tiny.t5_tokenizer()
    text = T5Gemma2TextConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer),
        max_position_embeddings=512, head_dim=16, num_key_value_heads=2, dropout_rate=0.0,
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    encoder = T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, mlp_ratio=4.0, patch_size=1, patch_size_t=1, qk_norm="rms_norm", text_embed_dim=32,
        rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    return diffusers.MotifVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=tiny_videos.wan_vae(), text_encoder=encoder.eval(),
        tokenizer=tokenizer, transformer=transformer.eval(), guider=diffusers.AdaptiveProjectedGuidance(),
        feature_extractor=None,
    )  # fmt: skip


def helios_transformer() -> Any:
    return diffusers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_dim=(4, 4, 4), has_multi_term_memory_patch=True, guidance_cross_attn=True, zero_history_timestep=True,
        is_amplify_history=False,
    ).eval()  # fmt: skip


def helios_scheduler() -> Any:
    return diffusers.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)


def sana_wm() -> DiffusionPipeline:
    torch.manual_seed(0)
    vae = tiny_videos.ltx2().vae
    transformer = diffusers.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
        chunk_plucker_channels=6 * vae.temporal_compression_ratio, chunk_plucker_post_attn_blocks=2,
        caption_channels=32,
    )  # fmt: skip
    return diffusers.SanaWMPipeline(
        tokenizer=padded_tokenizer(), text_encoder=gemma2(), vae=vae, transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def kandinsky6() -> DiffusionPipeline:
    """Kandinsky 6, videos with sound; with a tokenizer in the place of its processor, as `kandinsky5`."""
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), in_audio_dim=4, out_audio_dim=4,
        text_token_padding=True, ca_rope=True, cross_gates=True, fix_modulation=True,
        visual_token_type_num_embeddings=2,
    )  # fmt: skip
    audio_vae = diffusers.MMAudioVAE(
        mel_bins=8, latent_channels=4, hidden_channels=16, channel_multipliers=(1, 2), layers_per_block=1,
        sample_rate=1600, n_fft=64, hop_length=8,
    )  # fmt: skip
    vocoder = diffusers.MMAudioVocoder(
        num_mels=8, upsample_initial_channel=16, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),),
    )  # fmt: skip
    return diffusers.Kandinsky6TI2VAPipeline(
        transformer=transformer.eval(), vae=hunyuan_vae(), text_encoder=qwen2_5_vl(),
        tokenizer=tiny_families.qwen_tokenizer(), text_encoder_2=tiny.clip(), tokenizer_2=tiny.clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), audio_vae=audio_vae.eval(), vocoder=vocoder.eval(),
    )  # fmt: skip


def wan_animate_transformer() -> Any:
    return diffusers.WanAnimateTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=36, latent_channels=16,
        out_channels=16, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", image_dim=32, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()  # fmt: skip


def stable_video_diffusion() -> DiffusionPipeline:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=2, num_attention_heads=4, image_size=224,
        intermediate_size=37, patch_size=32,
    )  # fmt: skip
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=32,
        num_attention_heads=8, projection_class_embeddings_input_dim=96, addition_time_embed_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae.eval(), image_encoder=CLIPVisionModelWithProjection(vision).eval(), unet=unet.eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002,
            timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessorPil(),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "StableVideoDiffusionPipeline": Case(stable_video_diffusion, "i", 4),
    "Kandinsky5T2VPipeline": Case(kandinsky5("Kandinsky5T2VPipeline"), frames=5),
    "Kandinsky5I2VPipeline": Case(kandinsky5("Kandinsky5I2VPipeline", True), "i", 17),
    "HunyuanVideo15Pipeline": Case(hunyuan_video15, frames=VIDEO),
    "HunyuanVideo15ImageToVideoPipeline": Case(lambda: hunyuan_video15(True), "i", VIDEO),
    "CosmosTextToWorldPipeline": Case(cosmos("CosmosTextToWorldPipeline", 4), frames=VIDEO),
    "CosmosVideoToWorldPipeline": Case(cosmos("CosmosVideoToWorldPipeline", 5), "i", VIDEO),
    "Cosmos2VideoToWorldPipeline": Case(cosmos("Cosmos2VideoToWorldPipeline", 17, True), "i", VIDEO),
    "Cosmos2_5_PredictBasePipeline": Case(cosmos("Cosmos2_5_PredictBasePipeline", 17, True), frames=VIDEO),
    "Cosmos2TextToImagePipeline": Case(cosmos("Cosmos2TextToImagePipeline", 16, True)),
    "SanaVideoPipeline": Case(sana_video, frames=VIDEO, settings={"use_resolution_binning": False}),
    "SanaImageToVideoPipeline": Case(
        of("SanaImageToVideoPipeline", sana_video, scheduler=FlowMatchEulerDiscreteScheduler),
        "i",
        VIDEO,
        settings={"use_resolution_binning": False},
    ),
    "I2VGenXLPipeline": Case(i2vgen_xl, "i", 4),
    "HunyuanVideoImageToVideoPipeline": Case(hunyuan_video_of_image, "i", VIDEO),
    "MotifVideoPipeline": Case(motif_video, frames=VIDEO),
    "HeliosPipeline": Case(
        of("HeliosPipeline", tiny_videos.wan, transformer=helios_transformer, scheduler=helios_scheduler), frames=VIDEO
    ),
    "LTX2InContextPipeline": Case(of("LTX2InContextPipeline", tiny_videos.ltx2), frames=VIDEO),
    "Kandinsky6TI2VAPipeline": Case(kandinsky6, "i", VIDEO),
    "AnyFlowFARPipeline": Case(
        wan_like(
            "AnyFlowFARPipeline",
            "AnyFlowFARTransformer3DModel",
            lambda: diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0),
            compressed_patch_size=(1, 4, 4),
            full_chunk_limit=3,
            gate_value=0.25,
            deltatime_type="r",
            chunk_partition=(1, 1, 1),
        ),
        frames=VIDEO,
    ),
    "EasyAnimatePipeline": Case(easyanimate(), frames=5, negative="blurry"),
    "EasyAnimateInpaintPipeline": Case(of("EasyAnimateInpaintPipeline", easyanimate(9)), frames=5, negative="blurry"),
    "LTXI2VLongMultiPromptPipeline": Case(of("LTXI2VLongMultiPromptPipeline", tiny_videos.ltx), frames=17),
    "TextToVideoZeroPipeline": Case(
        of("TextToVideoZeroPipeline", lambda: tiny_families.sd15_with_safety_checker(False), scheduler=ddim),
        frames=4,
        settings={"t0": 1, "t1": 2},
    ),
    "TextToVideoZeroSDXLPipeline": Case(
        of("TextToVideoZeroSDXLPipeline", tiny.sdxl, scheduler=ddim), frames=4, settings={"t0": 1, "t1": 2}
    ),
    "AnimateDiffControlNetPipeline": Case(
        of(
            "AnimateDiffControlNetPipeline",
            tiny.sd15,
            unet=lambda: unet(4),
            motion_adapter=motion_adapter,
            controlnet=controlnet,
            scheduler=ddim,
        ),
        "v",
        9,
        videos=("conditioning_frames",),
    ),
    "AnimateDiffSparseControlNetPipeline": Case(
        of(
            "AnimateDiffSparseControlNetPipeline",
            tiny.sd15,
            unet=lambda: unet(4),
            motion_adapter=motion_adapter,
            controlnet=sparse_controlnet,
            scheduler=ddim,
        ),
        "v",
        9,
        settings={"controlnet_frame_indices": "0,1,2,3,4,5,6,7,8"},
        videos=("conditioning_frames",),
    ),
    "AnimateDiffVideoToVideoPipeline": Case(
        of(
            "AnimateDiffVideoToVideoPipeline",
            tiny.sd15,
            unet=lambda: unet(4),
            motion_adapter=motion_adapter,
            scheduler=ddim,
        ),
        "v",
    ),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(
        of(
            "AnimateDiffVideoToVideoControlNetPipeline",
            tiny.sd15,
            unet=lambda: unet(4),
            motion_adapter=motion_adapter,
            controlnet=controlnet,
            scheduler=ddim,
        ),
        "v",
        videos=("video", "conditioning_frames"),
    ),
    "CogVideoXFunControlPipeline": Case(
        of("CogVideoXFunControlPipeline", tiny_videos.cogvideox, transformer=lambda: cogvideox_transformer(8)),
        "v",
        videos=("control_video",),
    ),
    "CogVideoXVideoToVideoPipeline": Case(of("CogVideoXVideoToVideoPipeline", tiny_videos.cogvideox), "v"),
    "WanVideoToVideoPipeline": Case(of("WanVideoToVideoPipeline", tiny_videos.wan), "v"),
    "VideoToVideoSDPipeline": Case(of("VideoToVideoSDPipeline", tiny.sd15, unet=unet3d, scheduler=ddim), "v"),
    "LucyEditPipeline": Case(
        of(
            "LucyEditPipeline",
            tiny_videos.wan,
            transformer=lambda: tiny_videos.wan_transformer(32),
            scheduler=FlowMatchEulerDiscreteScheduler,
        ),
        "v",
        VIDEO,
    ),
    "WanAnimatePipeline": Case(
        of("WanAnimatePipeline", tiny_videos.wan_of_image, transformer=wan_animate_transformer),
        "iv",
        videos=("pose_video", "face_video"),
        length=13,
        settings={"segment_frame_length": 9},
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Case(
        wan_like(
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "SkyReelsV2Transformer3DModel",
            qk_norm="rms_norm_across_heads",
        ),
        "v",
        17,
        settings={"overlap_history": 3, "base_num_frames": 5},
    ),
}

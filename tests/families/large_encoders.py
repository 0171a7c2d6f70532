"""Pipelines whose text encoders are language or vision-language models."""

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral3Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from tests import tiny, tiny_families
from tests.families.case import Case, of, plain
from tests.families.parts import vae8

# The message of a chat is a text, or a list of texts and images.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = tiny_families.qwen_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenizer_of_length(length: int) -> Qwen2Tokenizer:
    """A tokenizer with a greatest length; a prompt enhancer's is that of its new prompts."""
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


def tokens_of_images() -> dict[str, int]:
    """Return the numbers of the tokens that a vision-language model of Qwen knows images by."""
    tokenizer = chat_tokenizer()
    names = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>",
             "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen2_vl() -> Any:
    config = Qwen2_5_VLConfig(
        text_config={**tiny_families.QWEN, "num_hidden_layers": 2, "rope_scaling": ROPE, "rope_theta": 1e6,
                     "vocab_size": len(chat_tokenizer())},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        **tokens_of_images(),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen3_vl(cls: Any = Qwen3VLForConditionalGeneration, layers: int = 2, patch_size: int = 14) -> Any:
    config = Qwen3VLConfig(
        text_config={**tiny_families.QWEN, "head_dim": 8, "num_hidden_layers": layers, "rope_scaling": ROPE,
                     "rope_theta": 1e6, "vocab_size": len(chat_tokenizer())},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "patch_size": patch_size, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        **tokens_of_images(),
    )  # fmt: skip
    return cls(config).eval()


def vl_processor(cls: Any = Qwen2VLProcessor, patch_size: int = 14, tokens: int = 4) -> Any:
    """A processor of texts and images, which needs no torchvision.

    Its class wants a processor of videos, too, which needs it; so the class is told here that it has none.
    """
    cls.get_attributes = classmethod(lambda _: ["image_processor", "tokenizer"])
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": (2 * patch_size) ** 2, "longest_edge": tokens * (2 * patch_size) ** 2},
    )
    return cls(image_processor=images, tokenizer=chat_tokenizer(), chat_template=TEMPLATE)


def coarse_qwen_vae() -> Any:
    """A VAE of 32 pixels a latent, for the pipelines that encode pictures at a size of their own, 1024 x 1024."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def qwen_image_edit() -> DiffusionPipeline:
    parts = tiny_families.qwen_image().components
    torch.manual_seed(0)
    return diffusers.QwenImageEditPipeline(
        **parts | {"processor": vl_processor(), "vae": coarse_qwen_vae(), "text_encoder": qwen2_vl()}
    )


def flux2() -> DiffusionPipeline:
    torch.manual_seed(0)
    parts = tiny_families.flux2_klein().components
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=True,
    )  # fmt: skip
    # Of its processor only the tokenizer is used; PixtralProcessor itself needs torchvision.
    return diffusers.Flux2Pipeline(
        scheduler=parts["scheduler"], vae=parts["vae"], text_encoder=mistral3(Mistral3ForConditionalGeneration, 31),
        tokenizer=chat_tokenizer(), transformer=transformer.eval(),
    )  # fmt: skip


def tokens_and_heads(layers: int) -> dict[str, Any]:
    """Settings of a small language model over `chat_tokenizer`."""
    return {**tiny_families.QWEN, "head_dim": 8, "num_hidden_layers": layers, "vocab_size": len(chat_tokenizer()),
            "pad_token_id": 0}  # fmt: skip


def ovis() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny.vae(), text_encoder=tiny_families.qwen3(Qwen3Model, 2),
        tokenizer=chat_tokenizer(), transformer=transformer.eval(),
    )  # fmt: skip


def prx_transformer(channels: int, **settings: Any) -> Any:
    return diffusers.PRXTransformer2DModel(
        patch_size=1, in_channels=channels, context_in_dim=16, hidden_size=8, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[2, 2], **settings,
    ).eval()  # fmt: skip


def prx() -> DiffusionPipeline:
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    torch.manual_seed(0)
    half = {**tokens_and_heads(1), "layer_types": ["full_attention"]}
    config = T5GemmaConfig(encoder=half, decoder=half, is_encoder_decoder=False, dropout_rate=0.0)
    text_encoder = T5GemmaEncoder(config.encoder).eval()
    text_encoder.config = config  # of the whole model, as published ones have it
    return diffusers.PRXPipeline(
        transformer=prx_transformer(4), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder, tokenizer=tokenizer_of_length(64), vae=tiny.vae(),
    )  # fmt: skip


def prx_pixel() -> DiffusionPipeline:
    """A pipeline without a VAE."""
    torch.manual_seed(0)
    return diffusers.PRXPixelPipeline(
        transformer=prx_transformer(3, bottleneck_size=8, resolution_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=tiny_families.qwen3(Qwen3Model, 2),
        tokenizer=chat_tokenizer(), prompt_max_tokens=16,
    )  # fmt: skip


def mistral3(cls: Any, layers: int) -> Any:
    tokenizer = chat_tokenizer()
    config = Mistral3Config(
        text_config={"model_type": "mistral", **tokens_and_heads(layers), "sliding_window": None},
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
                       "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip
    return cls(config).eval()


def prompt_enhancer() -> Any:
    """A language model that writes prompts anew; always the same ones."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    model = Ministral3ForCausalLM(Ministral3Config(**tokens_and_heads(2), sliding_window=None)).eval()
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    return model


def ernie() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(
        transformer=transformer.eval(), vae=tiny_families.flux2_klein().vae, text_encoder=mistral3(Mistral3Model, 2),
        tokenizer=chat_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def fibo() -> DiffusionPipeline:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, text_encoder_dim=16, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, scale_factor_temporal=4,
        is_residual=True,
    )  # fmt: skip
    # The pipeline has an empty prompt's token, of the number 128000, in its code.
    config = SmolLM3Config(**{**tokens_and_heads(2), "vocab_size": 128001})
    return diffusers.BriaFiboPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(),
        text_encoder=SmolLM3ForCausalLM(config).eval(), tokenizer=chat_tokenizer(),
    )  # fmt: skip


def fibo2() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.BriaFibo2Transformer2DModel(
        in_channels=1, patch_size=2, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, cap_feat_dim=48,
        injection_layer_ids=(1, 2, 3, 4, 5), perceiver_num_layers=1, min_num_gist_tokens=16,
        max_num_gist_tokens=32, gist_step=8, axes_dims=(4, 6, 6), axes_lens=(2048, 64, 64),
    )  # fmt: skip
    return diffusers.BriaFibo2Pipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_families.flux2_klein().vae, text_encoder=qwen3_vl(layers=36), processor=vl_processor(Qwen3VLProcessor),
    )  # fmt: skip


def hunyuan_image() -> DiffusionPipeline:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=16, text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1,
        scaling_factor=0.476986, spatial_compression_ratio=8, sample_size=128,
    )  # fmt: skip
    glyphs = ByT5Tokenizer()
    config = T5Config(vocab_size=len(glyphs), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return diffusers.HunyuanImagePipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=qwen2_vl(), tokenizer=chat_tokenizer(), text_encoder_2=T5EncoderModel(config).eval(),
        tokenizer_2=glyphs, guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )  # fmt: skip


def hunyuan_refiner() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1, 1), guidance_embeds=True, text_embed_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanImageRefiner(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1,
        spatial_compression_ratio=16, temporal_compression_ratio=4,
    )  # fmt: skip
    return diffusers.HunyuanImageRefinerPipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=qwen2_vl(), tokenizer=chat_tokenizer(),
    )  # fmt: skip


def kandinsky5(conditioned: bool = False) -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=32, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=16, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(1, 1, 2),
        visual_cond=conditioned, attention_type="regular",
    )  # fmt: skip
    cls = diffusers.Kandinsky5I2IPipeline if conditioned else diffusers.Kandinsky5T2IPipeline
    return cls(
        transformer=transformer.eval(), vae=vae8(mid_block_add_attention=False), text_encoder=qwen2_vl(),
        tokenizer=vl_processor(), text_encoder_2=tiny.clip(), tokenizer_2=tiny.clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip


def longcat(cls: Any = diffusers.LongCatImagePipeline) -> DiffusionPipeline:
    """A pipeline whose text encoder writes the prompt anew; its answers are of one token, as any token ends them."""
    torch.manual_seed(0)
    text_encoder = qwen2_vl()
    text_encoder.generation_config.eos_token_id = list(range(len(chat_tokenizer())))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 6, down_block_types=("DownEncoderBlock2D",) * 6, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 6, latent_channels=16, layers_per_block=0, shift_factor=0.1,
        scaling_factor=0.4, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return cls(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=text_encoder,
        tokenizer=chat_tokenizer(), text_processor=vl_processor(), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def dreamlite(cls: Any = diffusers.DreamLitePipeline) -> DiffusionPipeline:
    torch.manual_seed(0)
    unet = diffusers.DreamLiteUNetModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), cross_attention_dim=16,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), attention_head_dim=8,
        layers_per_block=1, norm_num_groups=8, transformer_layers_per_block=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    return cls(
        text_encoder=qwen3_vl(), tokenizer=chat_tokenizer(), processor=vl_processor(Qwen3VLProcessor), vae=vae.eval(),
        unet=unet.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def nucleus() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), num_experts=8, moe_intermediate_dim=16,
        capacity_factors=2.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if ".experts." in name:
                weight.normal_(std=0.02)  # they are not initialised
    return diffusers.NucleusMoEImagePipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_families.qwen_image().vae, text_encoder=qwen3_vl(layers=9), processor=vl_processor(Qwen3VLProcessor),
    )  # fmt: skip


def qwen_image21() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    processor = vl_processor(Qwen3VLProcessor, patch_size=16, tokens=64)  # as many tokens as the VAE makes
    return diffusers.QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=qwen3_vl(patch_size=16),
        processor=processor, transformer=transformer.eval(),
    )  # fmt: skip


def ideogram4() -> DiffusionPipeline:
    torch.manual_seed(0)

    def transformer() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=1, intermediate_size=16,
            adaln_dim=16, llm_features_dim=13 * 16, mrope_section=(2, 1, 1),
        ).eval()  # fmt: skip

    return diffusers.Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_families.flux2_klein().vae,
        text_encoder=qwen3_vl(Qwen3VLModel, 36), tokenizer=chat_tokenizer(), transformer=transformer(),
        unconditional_transformer=transformer(),
    )  # fmt: skip


def z_image_omni() -> DiffusionPipeline:
    parts = tiny_families.z_image().components
    torch.manual_seed(0)
    config = {**plain(parts["transformer"]), "siglip_feat_dim": 16}
    transformer = diffusers.ZImageTransformer2DModel.from_config(config)
    with torch.no_grad():
        for name in ("x_pad_token", "cap_pad_token", "siglip_pad_token"):
            getattr(transformer, name).fill_(1.0)  # they are not initialised
    siglip = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=8
    )
    return diffusers.ZImageOmniPipeline(
        **parts | {"transformer": transformer.eval()}, siglip=Siglip2VisionModel(siglip).eval(),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
    )  # fmt: skip


def joy_vae() -> Any:
    """A VAE of 32 pixels a latent, as pictures are of 1024 x 1024 at least."""
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=32, scale_factor_temporal=1,
    ).eval()  # fmt: skip


def joy(plus: bool = False) -> DiffusionPipeline:
    name = "JoyImageEditPlus" if plus else "JoyImageEdit"
    torch.manual_seed(0)
    transformer = getattr(diffusers, f"{name}Transformer3DModel")(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=1,
        rope_dim_list=[4, 6, 6], theta=256,
    )  # fmt: skip
    pipeline: DiffusionPipeline = getattr(diffusers, f"{name}Pipeline")(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=joy_vae(), text_encoder=qwen3_vl(),
        tokenizer=chat_tokenizer(), transformer=transformer.eval(), processor=vl_processor(Qwen3VLProcessor),
    )  # fmt: skip
    return pipeline


def glm_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer that names the tokens which GLM-Image's processor asks for."""
    names = {"image_token": "<|image_pad|>", "grid_bos_token": "<|vision_start|>", "grid_eos_token": "<|vision_end|>"}
    whole = chat_tokenizer()
    tokenizer = Qwen2Tokenizer(
        vocab=whole.get_vocab(), merges=[], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        bos_token="<|im_start|>", extra_special_tokens=names, chat_template=TEMPLATE,
    )  # fmt: skip
    return tokenizer


def glm_image() -> DiffusionPipeline:
    from transformers import (
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageImageProcessorPil,
        GlmImageProcessor,
        T5Config,
        T5EncoderModel,
    )

    torch.manual_seed(0)
    tokenizer = glm_tokenizer()
    tokens = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in ("image_token", "bos_token")}
    config = GlmImageConfig(
        text_config={**tiny_families.QWEN, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": 0,
                     "vision_vocab_size": 130, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": (2, 1, 1)},
                     "eos_token_id": 129},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 32, "patch_size": 8,
                       "intermediate_size": 16},
        vq_config={"embed_dim": 16, "num_embeddings": 128, "latent_channels": 16},
        image_token_id=tokens["image_token"], image_start_token_id=tokens["bos_token"], image_end_token_id=129,
    )  # fmt: skip
    images = GlmImageImageProcessorPil(
        patch_size=8, temporal_patch_size=1, merge_size=1, size={"shortest_edge": 16**2, "longest_edge": 32**2}
    )
    encoder = GlmImageForConditionalGeneration(config).eval()
    encoder.generation_config.suppress_tokens = [128, 129]  # no end before all of the picture's tokens are there
    glyphs = ByT5Tokenizer()
    t5 = T5Config(vocab_size=len(glyphs), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=130,
    )  # fmt: skip
    return diffusers.GlmImagePipeline(
        tokenizer=glyphs, processor=GlmImageProcessor(images, tokenizer, chat_template=TEMPLATE),
        text_encoder=T5EncoderModel(t5).eval(), vision_language_encoder=encoder,
        vae=vae8(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "QwenImageEditPipeline": Case(qwen_image_edit, "i", size=64),
    "QwenImageEditPlusPipeline": Case(of("QwenImageEditPlusPipeline", qwen_image_edit), "i", size=64),
    "QwenImageEditInpaintPipeline": Case(of("QwenImageEditInpaintPipeline", qwen_image_edit), "im", size=64),
    "Flux2Pipeline": Case(flux2),
    "OvisImagePipeline": Case(ovis),
    "PRXPixelPipeline": Case(prx_pixel, settings={"use_resolution_binning": False}),
    "BriaFiboPipeline": Case(fibo),
    "BriaFibo2Pipeline": Case(fibo2, size=64),
    "HunyuanImagePipeline": Case(hunyuan_image),
    "HunyuanImageRefinerPipeline": Case(hunyuan_refiner, "i"),
    "LongCatImagePipeline": Case(longcat, size=64),
    "LongCatImageEditPipeline": Case(lambda: longcat(diffusers.LongCatImageEditPipeline), "i", size=64),
    "DreamLitePipeline": Case(dreamlite, "i"),
    "DreamLiteMobilePipeline": Case(lambda: dreamlite(diffusers.DreamLiteMobilePipeline), "i"),
    "NucleusMoEImagePipeline": Case(nucleus),
    "QwenImage21Pipeline": Case(qwen_image21, "i", size=64, settings={"output_resolution": 64}),
    "Ideogram4Pipeline": Case(ideogram4, steps=48),  # its default schedule of guidance is of 48 steps
    "ZImageOmniPipeline": Case(z_image_omni),
    "GlmImagePipeline": Case(glm_image, size=64),
    "ErnieImagePipeline": Case(
        of("ErnieImagePipeline", ernie, pe=prompt_enhancer, pe_tokenizer=lambda: tokenizer_of_length(8)), size=64
    ),
    "JoyImageEditPipeline": Case(joy, "i", size=64),
    "JoyImageEditPlusPipeline": Case(lambda: joy(plus=True), size=64),
    "PRXPipeline": Case(prx, settings={"use_resolution_binning": False}),
    "Kandinsky5T2IPipeline": Case(kandinsky5),
    "Kandinsky5I2IPipeline": Case(lambda: kandinsky5(conditioned=True), "i"),
    "BriaFiboEditPipeline": Case(of("BriaFiboEditPipeline", fibo), "i", prompt='{"edit_instruction": "a red circle"}'),
}

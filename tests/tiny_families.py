"""Tiny pipelines of families that people run today, beside those of `tiny`; random weights, real classes."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests import tiny

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
QWEN = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of one token a byte, in Qwen's layout."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    vocab |= {token: len(vocab) + i for i, token in enumerate(SPECIAL)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL[1:]),
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3(cls: Any, layers: int) -> Any:
    size = len(qwen_tokenizer())
    return cls(
        Qwen3Config(**QWEN, head_dim=8, num_hidden_layers=layers, vocab_size=size, max_position_embeddings=2048)
    ).eval()


def qwen_image() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    config = Qwen2_5_VLConfig(
        text_config={**QWEN, "num_hidden_layers": 2, "rope_scaling": rope, "rope_theta": 1e6,
                     "vocab_size": len(qwen_tokenizer())},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )


def z_image() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4],
        axes_lens=[512, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.copy_(torch.ones_like(token))  # they are not initialised
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny.vae(latent_channels=16),
        text_encoder=qwen3(Qwen3Model, 2),
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )


def flux2_klein() -> DiffusionPipeline:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        layers_per_block=1, latent_channels=1, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        sample_size=32,
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=qwen3(Qwen3ForCausalLM, 28),  # its default reads the 9th, 18th and 27th layer
        tokenizer=qwen_tokenizer(),
        transformer=transformer.eval(),
    )


def kontext() -> DiffusionPipeline:
    return FluxKontextPipeline(**tiny.flux().components)


def sd15_with_safety_checker(flags: bool) -> DiffusionPipeline:
    """A Stable Diffusion whose safety checker flags all pictures, or none."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    size = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "projection_dim": 32}
    vision = {**size, "num_hidden_layers": 2, "image_size": 30, "patch_size": 15}
    config = CLIPConfig(vision_config=vision, text_config={**size, "num_hidden_layers": 1}, projection_dim=32)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        checker.concept_embeds_weights.fill_(-2.0 if flags else 2.0)  # thresholds of similarity
        checker.special_care_embeds_weights.fill_(2.0)
    parts = {"safety_checker": checker, "feature_extractor": CLIPImageProcessorPil(size=30, crop_size=30)}
    return StableDiffusionPipeline(**dict(tiny.sd15().components) | parts)

"""Pipelines whose text encoders are language or vision-language models."""

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from tests import tiny, tiny_families
from tests.families.case import Case, of

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


def qwen3_vl(cls: Any = Qwen3VLForConditionalGeneration, layers: int = 2) -> Any:
    config = Qwen3VLConfig(
        text_config={**tiny_families.QWEN, "head_dim": 8, "num_hidden_layers": layers, "rope_scaling": ROPE,
                     "rope_theta": 1e6, "vocab_size": len(chat_tokenizer())},
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        **tokens_of_images(),
    )  # fmt: skip
    return cls(config).eval()


def vl_processor(cls: Any = Qwen2VLProcessor) -> Any:
    """A processor of texts and images, which needs no torchvision.

    Its class wants a processor of videos, too, which needs it; so the class is told here that it has none.
    """
    cls.get_attributes = classmethod(lambda _: ["image_processor", "tokenizer"])
    images = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 4 * 28**2}
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
    tokenizer = chat_tokenizer()
    config = Mistral3Config(
        text_config={"model_type": "mistral", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
                     "num_hidden_layers": 31, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer),
                     "sliding_window": None},
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
                       "num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=256, axes_dims_rope=[4, 4, 4, 4], guidance_embeds=True,
    )  # fmt: skip
    # Of its processor only the tokenizer is used; PixtralProcessor itself needs torchvision.
    return diffusers.Flux2Pipeline(
        scheduler=parts["scheduler"], vae=parts["vae"], text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=tokenizer, transformer=transformer.eval(),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "QwenImageEditPipeline": Case(qwen_image_edit, "i", size=64),
    "QwenImageEditPlusPipeline": Case(of("QwenImageEditPlusPipeline", qwen_image_edit), "i", size=64),
    "QwenImageEditInpaintPipeline": Case(of("QwenImageEditInpaintPipeline", qwen_image_edit), "im", size=64),
    "QwenImageLayeredPipeline": Case(of("QwenImageLayeredPipeline", qwen_image_edit), "i", size=64),
    "Flux2Pipeline": Case(flux2),
}
TROUBLE: dict[str, Case] = {}

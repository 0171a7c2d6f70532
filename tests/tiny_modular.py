"""Tiny modular pipelines, saved into folders as diffusers saves them; random weights, real classes."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModularPipeline
from transformers import CLIPImageProcessorPil, LlavaProcessor

from tests import tiny_families
from tests.families import large_encoders


def saved(folder: Path, blocks: str, parts: dict[str, Any]) -> Path:
    """Save a pipeline of these blocks and components, and an index which says that they are in this folder."""
    pipeline: ModularPipeline = getattr(diffusers, blocks)().init_pipeline()
    pipeline.update_components(**parts)
    pipeline.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def packed_vae() -> Any:
    """A VAE of FLUX.2 and FLUX.3, of 8 pixels a latent, as published ones."""
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4, layers_per_block=1, latent_channels=1, norm_num_groups=1, sample_size=32,
    ).eval()  # fmt: skip


def processor() -> Any:
    """A processor with a chat tokenizer; Qwen3-VL's own wants torchvision wherever it is loaded."""
    tokenizer = large_encoders.chat_tokenizer()
    images = CLIPImageProcessorPil(size=32, crop_size=32)
    return LlavaProcessor(images, tokenizer, chat_template=large_encoders.TEMPLATE, image_token="<|image_pad|>")


def writer() -> Any:
    """A language model that writes prompts anew, of one letter: any of its tokens ends them."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = large_encoders.chat_tokenizer()
    config = Qwen3_5Config(
        text_config={
            **tiny_families.QWEN, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "head_dim": 8,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
                                "partial_rotary_factor": 1.0},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "num_position_embeddings": 16},
        **large_encoders.tokens_of_images(),
    )  # fmt: skip
    model = Qwen3_5ForConditionalGeneration(config).eval()
    letters = set(tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    every = range(len(tokenizer))
    model.generation_config.eos_token_id = list(every)
    model.generation_config.pad_token_id = 0
    model.generation_config.suppress_tokens = [token for token in every if token not in letters]
    return model


def flux3(folder: Path, blocks: str = "Flux3AutoBlocks", writes: bool = True) -> Path:
    """FLUX.3, with the language model that writes its prompts, unless `writes` is false.

    Its blocks can't do without; so a pipeline that has none has to be made without that step.
    """
    torch.manual_seed(0)
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8 * 16, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
        flow_map="Distilled" in blocks,
    )  # fmt: skip
    # Of the text encoder the 4th, 8th and so on to the 32nd layer are read.
    parts = {"text_encoder": large_encoders.qwen3_vl(layers=32), "tokenizer": processor(), "vae": packed_vae(),
             "transformer": transformer.eval()}  # fmt: skip
    if writes:
        parts |= {"prompt_upsampler": writer(), "prompt_upsampler_processor": large_encoders.chat_tokenizer()}
    return saved(folder, blocks, parts)


def flux3_distilled(folder: Path) -> Path:
    return flux3(folder, "Flux3DistilledAutoBlocks")

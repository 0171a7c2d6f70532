"""Tiny modular pipelines, saved into folders as diffusers saves them; random weights, real classes."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler, ModularPipeline
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaProcessor, Qwen2VLImageProcessorPil

from tests import tiny, tiny_families, tiny_videos
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
    """A processor of chats and pictures; Qwen3-VL's own wants torchvision wherever it is loaded."""
    images = Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 4 * 28**2}
    )
    tokenizer = large_encoders.chat_tokenizer()
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


def flux2_klein(folder: Path) -> Path:
    parts = dict(tiny_families.flux2_klein().components)
    torch.manual_seed(0)
    names = ("scheduler", "text_encoder", "tokenizer", "transformer")
    return saved(folder, "Flux2KleinAutoBlocks", {name: parts[name] for name in names} | {"vae": packed_vae()})


def vision() -> CLIPVisionModel:
    """An image encoder of 224 pixels and width 1280: the code of Wan-Animate 2 has both numbers in it.

    It is of half precision, as it makes up most of the pipeline's size.
    """
    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        patch_size=16,
    )  # fmt: skip
    return CLIPVisionModel(config).eval().to(torch.bfloat16)


def wan_animate_2(folder: Path, blocks: str = "WanAnimate2Blocks") -> Path:
    """Wan-Animate 2, which brings a picture in motion as a video tells it, in segments."""
    torch.manual_seed(0)
    transformer = diffusers.WanAnimate2Transformer3DModel(
        in_dim=36, dim=32, ffn_dim=32, freq_dim=32, text_dim=32, out_dim=16, num_heads=2, num_layers=2,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"text_encoder": tiny_videos.umt5(), "tokenizer": tiny.t5_tokenizer(), "image_encoder": vision(),
             "vae": tiny_videos.wan_vae(), "transformer": transformer.eval(), "scheduler": scheduler}  # fmt: skip
    return saved(folder, blocks, parts)


def wan_animate_2_distilled(folder: Path) -> Path:
    return wan_animate_2(folder, "WanAnimate2DistilledBlocks")


def minimax_h3(folder: Path) -> Path:
    """MiniMax H3, which makes videos with sound; with the transformer of its workflows without references alone."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4, block_out_channels=(8,) * 6, layers_per_block=1, norm_num_groups=4, decoder_num_layers=2,
        decoder_num_attention_heads=2, decoder_attention_head_dim=8, decoder_num_register_tokens=2, decoder_ffn_mult=2,
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4, encoder_rates=(2, 2), latent_dim=32, latent_channels=8, num_attention_heads=2, decoder_dim=16,
        decoder_rates=(2, 2), decoder_kernel_sizes=(4, 4), resblock_kernel_sizes=(3, 7),
        resblock_dilation_sizes=((1, 3), (1, 3)), latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip
    transformer = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=8, text_dim=16, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16,
        rope_freq_dim=2,
    )  # fmt: skip
    # Of the text encoder the 50th layer is read, which must not be the last one.
    parts = {"text_encoder": large_encoders.qwen3_vl(layers=51), "tokenizer": large_encoders.chat_tokenizer(),
             "processor": processor(), "vae": vae.eval(), "audio_vae": audio_vae.eval(),
             "transformer": transformer.eval(), "scheduler": diffusers.MiniMaxH3Scheduler(),
             "audio_scheduler": diffusers.MiniMaxH3Scheduler(shift=3.0)}  # fmt: skip
    return saved(folder, "MiniMaxH3Blocks", parts)


def qwen_image(folder: Path) -> Path:
    return saved(folder, "QwenImageAutoBlocks", dict(tiny_families.qwen_image().components))


def z_image(folder: Path) -> Path:
    return saved(folder, "ZImageAutoBlocks", dict(tiny_families.z_image().components))

"""Tiny Stable Diffusion models as one file, by the names that their makers gave: diffusers' reading, turned around."""

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file

RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
AROUND = {
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.", "conv_in.":
    "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.", "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}  # fmt: skip
ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def unet_name(key: str, config: Any) -> str:
    """Return the original name of a UNet's tensor."""
    blocks, layers = len(config.block_out_channels), config.layers_per_block
    for ours, theirs in AROUND.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    part, *rest = key.split(".")
    if part == "mid_block":
        kind, number, *rest = rest
        name = "middle_block.1." if kind == "attentions" else f"middle_block.{2 * int(number)}."
    else:
        block, kind, number, *rest = rest
        n, j = int(block), int(number)
        if part == "down_blocks" and kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (n + 1)}.0.op." + ".".join(rest[1:])
        if part == "down_blocks":
            name = f"input_blocks.{(layers + 1) * n + j + 1}.{int(kind == 'attentions')}."
        elif kind == "upsamplers":
            with_attention = "CrossAttn" in config.up_block_types[n]
            return f"output_blocks.{(layers + 1) * n + layers}.{1 + with_attention}." + ".".join(rest)
        else:
            name = f"output_blocks.{(layers + 1) * n + j}.{int(kind == 'attentions')}."
        assert n < blocks
    left = ".".join(rest)
    for ours, theirs in RESNET.items() if kind == "resnets" else ():
        if left.startswith(ours):
            left = theirs + left.removeprefix(ours)
    return name + left


def vae_name(key: str, blocks: int) -> str:
    """Return the original name of a VAE's tensor."""
    half, *rest = key.split(".")
    if half not in ("encoder", "decoder"):
        return key
    left = ".".join(rest).replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    for n in range(blocks):
        at = f"down.{n}." if half == "encoder" else f"up.{blocks - 1 - n}."
        old = f"down_blocks.{n}." if half == "encoder" else f"up_blocks.{n}."
        left = left.replace(f"{old}resnets.", f"{at}block.")
        left = left.replace(f"{old}downsamplers.0.", f"{at}downsample.").replace(
            f"{old}upsamplers.0.", f"{at}upsample."
        )
    left = left.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
    if left.startswith("mid_block.attentions.0."):
        left = left.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in ATTENTION.items():
            left = left.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
    return f"{half}.{left}"


def unet_and_vae(pipeline: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in pipeline.unet.state_dict().items():
        found[f"model.diffusion_model.{unet_name(key, pipeline.unet.config)}"] = value
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, value in pipeline.vae.state_dict().items():
        name = vae_name(key, blocks)
        square = ".attn_1." in name and value.ndim == 2
        found[f"first_stage_model.{name}"] = value[:, :, None, None] if square else value
    return found


def clip_names(encoder: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()
    }


def open_clip_names(encoder: Any, prefix: str) -> dict[str, torch.Tensor]:
    """Return OpenCLIP's tensors of a CLIPTextModelWithProjection."""
    weights, mapping = dict(encoder.state_dict()), DIFFUSERS_TO_LDM_MAPPING["openclip"]
    found: dict[str, torch.Tensor] = {}
    for ours, theirs in mapping["layers"].items():
        if ours in weights:
            value = weights.pop(ours)
            found[prefix + theirs] = value.T if theirs == "text_projection" else value
    for key in [key for key in weights if ".q_proj." in key]:
        three = [weights.pop(key.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        block, _, kind = key.partition(".q_proj.")
        weights[f"{block}.in_proj_{kind}"] = torch.cat(three)
    for key, value in weights.items():
        for ours, theirs in mapping["transformer"].items():
            key = key.replace(ours, theirs)
        found[f"{prefix}transformer.{key}"] = value
    return found


def write(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_file({key: value.to(dtype).contiguous() for key, value in tensors.items()}, path)
    return path


def sd15_tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    return unet_and_vae(pipeline) | clip_names(pipeline.text_encoder, "cond_stage_model.transformer.")


def sdxl_tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    """Its two encoders must differ in width, by which they are told apart."""
    first = clip_names(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    return unet_and_vae(pipeline) | first | open_clip_names(pipeline.text_encoder_2, "conditioner.embedders.1.model.")

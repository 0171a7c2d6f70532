"""Make a model folder with FLUX.1-dev's real shapes and random weights, 34 GB in bf16.

    python -m scripts.bench.random_flux /tmp/flux

Speed and memory depend on shapes and dtypes, not on values, so benchmarks and tests of placement need no download.
The tokenizers are the demo model's.
"""

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, ModelMixin
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

DEMO = Path(__file__).parents[2] / "workers" / "demo_model"


def random_weights(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """bf16 weights in place of meta ones: small normal matrices, vectors near one."""
    module = module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.uniform_(0.9, 1.1)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1], device=device).view(buffer.shape))
    return module


def parts(clip: CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """The four models on the meta device, with the shapes of black-forest-labs/FLUX.1-dev."""
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModel(CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                max_position_embeddings=77, vocab_size=49408, projection_dim=768, bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
            )),
            "text_encoder_2": T5EncoderModel(T5Config(
                d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=32128,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )),
            "transformer": FluxTransformer2DModel(
                patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
                axes_dims_rope=(16, 56, 56),
            ),
            "vae": AutoencoderKL(
                latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                norm_num_groups=32, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }  # fmt: skip


def save_shapes(pipeline: FluxPipeline, folder: Path) -> None:
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, ModelMixin):
            part.save_config(folder / name)
        else:
            part.save_pretrained(folder / name)


@click.command(help=__doc__.split("\n")[0])
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True, help="where random numbers are drawn")
@click.option("--no-weights", is_flag=True, help="only what 'triptych plan' needs: 2 MB in place of 34 GB")
def main(folder: Path, device: str, no_weights: bool) -> None:
    torch.manual_seed(0)
    clip = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=scheduler,
        tokenizer=clip,
        tokenizer_2=T5Tokenizer.from_pretrained(DEMO, subfolder="tokenizer_2"),
        **{name: module if no_weights else random_weights(module, device) for name, module in parts(clip).items()},
    )
    if no_weights:
        save_shapes(pipeline, folder)
    else:
        pipeline.save_pretrained(folder, max_shard_size="10GB")
    print(folder)


if __name__ == "__main__":
    main()

"""Make a model folder with the real shapes of a model that people use today, and random weights in bf16.

    python -m scripts.bench.random_model flux /tmp/flux

Speed and memory depend on shapes and dtypes, not on values, so benchmarks and tests of placement need no download.
Tokenizers are the demo model's, or have a token for each byte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    ModelMixin,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

DEMO = Path(__file__).parents[2] / "workers" / "demo_model"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class RealModel:
    """A model's shapes, and how its pictures are usually asked for.

    `build` returns a pipeline whose models are on the meta device; `depth` is the share of layers that it has.
    """

    build: Callable[["Depth"], DiffusionPipeline]
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)  # of the plain pipeline's call
    request: Mapping[str, Any] = field(default_factory=dict)  # of a JobRequest, to the same effect
    frames: int = 0
    size: tuple[int, int] = (1024, 1024)


@dataclass(frozen=True)
class Depth:
    """How many layers a model gets: all, or at most so many for a dry run."""

    most: int | None = None

    def __call__(self, layers: int) -> int:
        return min(layers, self.most or layers)


def bytes_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer of one token a byte, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    vocab = {token: number for number, token in enumerate([*bytes_to_unicode().values(), *special])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=[], unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=special[1:], model_max_length=131072,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def on_cpu(scheduler: Any, **options: Any) -> Any:
    """Make a scheduler: its tables hold numbers, also where models have shapes alone."""
    with torch.device("cpu"):
        return scheduler(**options)


def clip(clip_tokenizer: CLIPTokenizer, depth: Depth, large: bool = False) -> PreTrainedModel:
    """CLIP-L, or OpenCLIP-bigG with its projection."""
    width, layers, heads = (1280, 32, 20) if large else (768, 12, 12)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=width * 4, num_hidden_layers=depth(layers), num_attention_heads=heads,
        max_position_embeddings=77, vocab_size=49408, projection_dim=width,
        hidden_act="gelu" if large else "quick_gelu", bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id, pad_token_id=clip_tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if large else CLIPTextModel(config)


def qwen3(depth: Depth, width: int = 2560, inner: int = 9728) -> Qwen3ForCausalLM:
    """Qwen3-4B, or with 4096 and 12288 Qwen3-8B."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936, hidden_size=width, intermediate_size=inner, num_hidden_layers=depth(36),
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=width == 2560,
        )
    )  # fmt: skip


def flux_vae(**options: Any) -> AutoencoderKL:
    options = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **options}
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=32, sample_size=1024, **options,
    )  # fmt: skip


def flux(depth: Depth) -> FluxPipeline:
    """black-forest-labs/FLUX.1-dev, 12 B with T5-XXL: 34 GB."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer")
    scheduler = on_cpu(
        FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=scheduler,
        tokenizer=tokenizer,
        tokenizer_2=T5Tokenizer.from_pretrained(DEMO, subfolder="tokenizer_2"),
        text_encoder=clip(tokenizer, depth),
        text_encoder_2=T5EncoderModel(
            T5Config(
                d_model=4096, d_ff=10240, num_layers=depth(24), num_heads=64, d_kv=64, vocab_size=32128,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )
        ),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=depth(19), num_single_layers=depth(38), attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
        vae=flux_vae(use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


def z_image(depth: Depth) -> ZImagePipeline:
    """Tongyi-MAI/Z-Image-Turbo, 6 B with Qwen3-4B: 20 GB."""
    return ZImagePipeline(
        scheduler=on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0),
        tokenizer=bytes_tokenizer(),
        text_encoder=qwen3(depth).model,
        transformer=ZImageTransformer2DModel(n_layers=depth(30), n_refiner_layers=depth(2)),
        vae=flux_vae(use_quant_conv=False, use_post_quant_conv=False),
    )


def klein(depth: Depth, large: bool) -> Flux2KleinPipeline:
    """black-forest-labs/FLUX.2-klein-4B with Qwen3-4B, 16 GB, or -9B with Qwen3-8B, 35 GB."""
    scheduler = on_cpu(
        FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )  # fmt: skip
    # Three of the encoder's states go on, those of layers 9, 18 and 27: less layers would be no model.
    deep = Depth(None if depth.most is None else max(28, depth.most))
    return Flux2KleinPipeline(
        scheduler=scheduler,
        tokenizer=bytes_tokenizer(),
        text_encoder=qwen3(deep, 4096, 12288) if large else qwen3(deep),
        transformer=Flux2Transformer2DModel(
            num_layers=depth(8 if large else 5), num_single_layers=depth(24 if large else 20),
            num_attention_heads=32 if large else 24, joint_attention_dim=12288 if large else 7680,
            guidance_embeds=False,
        ),
        vae=AutoencoderKLFlux2(),
        is_distilled=True,
    )  # fmt: skip


def qwen_image(depth: Depth) -> QwenImagePipeline:
    """Qwen/Qwen-Image, 20 B with Qwen2.5-VL-7B: 58 GB."""
    scheduler = on_cpu(
        FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9,
        base_image_seq_len=256, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": depth(28), "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": depth(32), "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return QwenImagePipeline(
        scheduler=scheduler,
        tokenizer=bytes_tokenizer(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        ),
        transformer=QwenImageTransformer2DModel(
            patch_size=2, in_channels=64, out_channels=16, num_layers=depth(60), attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=3584, guidance_embeds=False, axes_dims_rope=(16, 56, 56),
        ),
        vae=AutoencoderKLQwenImage(),
    )  # fmt: skip


def krea(depth: Depth) -> Krea2Pipeline:
    """Krea 2, distilled, 12 B with Qwen3-VL-4B: 34 GB."""
    scheduler = on_cpu(
        FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=6400,
    )  # fmt: skip
    text = {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "patch_size": 16, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304,
    }  # fmt: skip
    return Krea2Pipeline(
        scheduler=scheduler,
        tokenizer=bytes_tokenizer(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
        transformer=Krea2Transformer2DModel(num_layers=depth(28)),
        vae=AutoencoderKLQwenImage(),
        is_distilled=True,
    )


def sdxl(depth: Depth) -> StableDiffusionXLPipeline:
    """stabilityai/stable-diffusion-xl-base-1.0, 2.6 B with two CLIPs: 7 GB."""
    tokenizer = CLIPTokenizer.from_pretrained(DEMO, subfolder="tokenizer")
    return StableDiffusionXLPipeline(
        scheduler=on_cpu(
            EulerDiscreteScheduler,
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=clip(tokenizer, depth),
        text_encoder_2=clip(tokenizer, depth, large=True),
        unet=UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20), transformer_layers_per_block=(1, depth(2), depth(10)),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        vae=flux_vae(latent_channels=4, scaling_factor=0.13025, shift_factor=None, force_upcast=True),
    )  # fmt: skip


def wan(depth: Depth) -> WanPipeline:
    """Wan-AI/Wan2.2-TI2V-5B with UMT5-XXL: 23 GB."""
    return WanPipeline(
        scheduler=on_cpu(
            UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
            flow_shift=5.0,
        ),
        tokenizer=T5Tokenizer.from_pretrained(DEMO, subfolder="tokenizer_2"),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=256384, d_model=4096, d_ff=10240, d_kv=64, num_layers=depth(24), num_heads=64,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=depth(30)
        ),
        vae=AutoencoderKLWan(
            base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12, out_channels=12,
            patch_size=2, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
        ),
        expand_timesteps=True,
    )  # fmt: skip


MODELS = {
    "flux": RealModel(flux, 28, {"guidance_scale": 3.5}),
    "z-image": RealModel(z_image, 9, {"guidance_scale": 0.0}, {"cfg_scale": 0.0}),
    "klein-4b": RealModel(lambda depth: klein(depth, False), 4),
    "klein-9b": RealModel(lambda depth: klein(depth, True), 4),
    "qwen-image": RealModel(
        qwen_image, 20, {"true_cfg_scale": 4.0, "negative_prompt": " "}, {"cfg_scale": 4.0, "negative_prompt": " "}
    ),
    "krea-2": RealModel(krea, 8, {"guidance_scale": 0.0}, {"cfg_scale": 0.0}),
    "sdxl": RealModel(sdxl, 30, {"guidance_scale": 5.0}, {"cfg_scale": 5.0}),
    "wan-5b": RealModel(
        wan, 20, {"guidance_scale": 5.0, "negative_prompt": "blurry"},
        {"cfg_scale": 5.0, "negative_prompt": "blurry"}, frames=49, size=(1280, 704),
    ),
}  # fmt: skip


def meta_pipeline(name: str, depth: int | None = None) -> DiffusionPipeline:
    with torch.device("meta"):
        return MODELS[name].build(Depth(depth))


def random_weights(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """bf16 weights in place of meta ones: small normal matrices, vectors near one."""
    module = module.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.uniform_(0.9, 1.1)
    buffers: Any = module.named_buffers()
    for name, buffer in buffers:  # those that are not saved are made again in loading
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1], device=device).view(buffer.shape))
        elif buffer.is_floating_point():
            buffer.uniform_(0.9, 1.1)
        else:
            buffer.zero_()
    return module


def save_shapes(pipeline: DiffusionPipeline, folder: Path) -> None:
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, ModelMixin):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)


def save(pipeline: DiffusionPipeline, folder: Path, device: str) -> None:
    """Draw the weights of one model after the other, so that a GPU or a host holds one at a time."""
    torch.manual_seed(0)
    save_shapes(pipeline, folder)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            drawn: Any = random_weights(part, device)
            drawn.save_pretrained(folder / name, max_shard_size="10GB")
            drawn.to("meta")


@click.command(help=__doc__.split("\n")[0])
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True, help="where random numbers are drawn")
@click.option("--depth", type=click.IntRange(1), help="layers at most, for a dry run; all by default")
@click.option("--no-weights", is_flag=True, help="only what 'triptych plan' needs: 2 MB in place of tens of GB")
def main(name: str, folder: Path, device: str, depth: int | None, no_weights: bool) -> None:
    pipeline = meta_pipeline(name, depth)
    if no_weights:
        save_shapes(pipeline, folder)
    else:
        save(pipeline, folder, device)
    print(folder)


if __name__ == "__main__":
    main()

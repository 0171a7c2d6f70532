"""Speedups of a stage, all of them features of torch and diffusers, put on its models while they are loaded."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    ModelMixin,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from protocol.errors import BadRequest
from protocol.speedups import parse_speedup
from protocol.stages import Stage
from workers.split.tensor_context import Parallel
from workers.weights.residency import Residency, compile_blocks

RECOMPILE_LIMIT = 64  # of one kind of block; beyond it a job would fail
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@dataclass(frozen=True, slots=True)
class StageSpeedups:
    """The speedups of one stage's models."""

    compiled: bool = False
    attention: str = ""
    cache: str = ""
    fuse_qkv: bool = False
    quantize: str = ""
    parallel: str = ""  # tensor-2 …

    @staticmethod
    def of(stage: Stage, speedups: tuple[str, ...]) -> "StageSpeedups":
        named = {name: value for where, name, value in map(parse_speedup, speedups) if where == stage}
        return StageSpeedups(
            "compile" in named, named.get("attention", ""), named.get("cache", ""), "fuse-qkv" in named,
            named.get("quantize", ""), named.get("parallel", ""),
        )  # fmt: skip

    def together(self, device: torch.device) -> Parallel | None:
        """Return how this process works in parallel with others, None if it doesn't; `device` is its own."""
        kind, _, size = self.parallel.partition("-")
        if kind == "tensor" or kind == "context":
            return Parallel(kind, int(size), device)  # type: ignore[arg-type]  # mypy does not narrow the parts
        return None

    def loading_arguments(self, cls: type) -> dict[str, Any]:
        """Return the arguments for `from_pretrained` of a component."""
        if not self.quantize:
            return {}
        if importlib.util.find_spec("torchao") is None:
            raise BadRequest("Quantization needs torchao.", 'Install it: pip install "triptych[quantize]".')
        import diffusers
        import transformers

        library = diffusers if issubclass(cls, ModelMixin) else transformers
        return {"quantization_config": library.TorchAoConfig(quantization(self.quantize))}

    def after_loading(self, module: Any) -> None:
        """Change a model while its weights are in host memory; BadRequest where it or this machine can't do it."""
        if self.attention:
            try:
                module.set_attention_backend(self.attention)
            except (AttributeError, ValueError, RuntimeError, ImportError) as error:
                reason = f"The attention backend {self.attention!r} can't be used: {error}"
                raise BadRequest(reason, "Choose another, or leave it out.") from error
        if self.fuse_qkv:
            fuse(module)

    def in_place(self, pipeline: DiffusionPipeline, residencies: dict[str, Residency]) -> None:
        """Compile the denoisers and enable their step caches, once the pipeline stands."""
        if not (self.compiled or self.cache):
            return
        for name, module in pipeline.components.items():
            if name.startswith(("transformer", "unet")) and isinstance(module, torch.nn.Module):
                if self.compiled:
                    allow_all_sizes()
                    own = [residency for residency in residencies.values() if residency.module is module]
                    for residency in own:
                        residency.compile()
                    if not own:
                        compile_blocks(module)
                if self.cache:
                    enable_cache(pipeline, module, self.cache)


EXACT = StageSpeedups()


def quantization(kind: str) -> Any:
    """Return torchao's configuration of weights, and for -dynamic of activations, too.

    It shall leave inductor's configuration as it is: what it recommends tries every kernel in all directions, for which
    FLUX.1-dev's blocks took 193 s to compile rather than 26 (an H100, 2026-11-26).
    """
    import torchao.quantization as ao

    match kind:
        case "int8":
            return ao.Int8WeightOnlyConfig(set_inductor_config=False)
        case "int8-dynamic":
            return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        case "fp8":
            return ao.Float8WeightOnlyConfig(set_inductor_config=False)
        case _:
            return ao.Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False)


def fuse(module: Any) -> None:
    """Fuse query, key and value into one product; the three separate weights go."""
    if not hasattr(module, "fuse_qkv_projections"):
        raise BadRequest(f"{type(module).__name__} can't fuse its query, key and value.", "Leave fuse-qkv out.")
    with torch.no_grad():
        module.fuse_qkv_projections()
    for part in module.modules():
        for fused, separate in FUSED.items():
            if isinstance(getattr(part, fused, None), torch.nn.Module):
                for name in separate:
                    setattr(part, name, None)


def enable_cache(pipeline: DiffusionPipeline, module: Any, text: str) -> None:
    """Enable one of diffusers' step caches; BadRequest for a model that takes none."""
    kind, _, threshold = text.partition(":")
    if not hasattr(module, "enable_cache"):
        reason = f"{type(module).__name__} can't use the step cache {kind!r}, nor any other of diffusers'."
        raise BadRequest(reason, "Leave it out.")
    now = {"current_timestep_callback": lambda: pipeline.current_timestep}
    match kind:
        case "first-block":
            config: Any = FirstBlockCacheConfig(threshold=float(threshold)) if threshold else FirstBlockCacheConfig()
        case "taylorseer":
            config = TaylorSeerCacheConfig()
        case "pyramid-attention":
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800), **now
            )
        case _:
            config = FasterCacheConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 681),
                tensor_format="BCHW", is_guidance_distilled=True, **now,
            )  # fmt: skip
    try:
        module.enable_cache(config)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise BadRequest(
            f"{type(module).__name__} can't use the step cache {kind!r}: {error}", "Choose another, or leave it out."
        ) from error


def allow_all_sizes() -> None:
    """Let blocks be compiled for all sizes and on all GPUs; this holds in the thread that calls it."""
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)

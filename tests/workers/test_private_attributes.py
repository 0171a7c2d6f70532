# mypy: ignore-errors
"""Private and undocumented names of the libraries: they are there, one check for each row of docs/upgrading.md."""

import ctypes
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import accelerate
import diffusers
import peft
import pytest
import torch
import transformers
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

FLUX = diffusers.FluxPipeline  # as one of the pipelines that are run
NAMES = (  # that can be looked up as they are; what stands in parentheses in the table is left out
    "torch._C._distributed_c10d.FileStore",
    "torch._dynamo.config.recompile_limit",
    "torch._inductor.list_options",
    "torch._foreach_copy_",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_unflatten",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.ops.aten._local_scalar_dense",
    "torch.utils.flop_counter.FlopCounterMode.get_flop_counts",
    "torch.Generator.graphsafe_set_state",
    "torch.Tensor._version",
    "torch.Tensor.data",
    "torch.nn.Linear.forward",
    "torch.distributed.tensor.DTensor._local_tensor",
    "diffusers.DiffusionPipeline._get_signature_keys",
    "diffusers.DiffusionPipeline._optional_components",
    "diffusers.DiffusionPipeline._execution_device",
    "diffusers.ModelMixin.device",
    "diffusers.AutoencoderKL.decode",
    "diffusers.configuration_utils.FrozenDict",
    "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution",
    "diffusers.models.autoencoders.vae.IdentityDistribution",
    "diffusers.pipelines.auto_pipeline._get_task_class",
    "diffusers.ModelMixin._fix_state_dict_keys_on_load",
    "diffusers.ModelMixin._keys_to_ignore_on_load_unexpected",
    "diffusers.ModelMixin._tp_plan",
    "diffusers.ModelMixin._cp_plan",
    "diffusers.ModelMixin._resolve_parallel_config",
    "diffusers.ModelMixin._parallel_config",
    "diffusers.loaders.lora_base.LoraBaseMixin._lora_loadable_modules",
    "diffusers.loaders.lora_pipeline.FluxLoraLoaderMixin.load_lora_into_transformer",
    "diffusers.utils.peft_utils.set_weights_and_activate_adapters",
    "diffusers.utils.peft_utils.set_adapter_layers",
    "peft.tuners.tuners_utils.BaseTunerLayer.delete_adapter",
    "peft.tuners.tuners_utils.BaseTunerLayer.active_adapters",
    "diffusers.models._modeling_parallel.ParallelConfig",
    "diffusers.models._modeling_parallel.ParallelConfig.setup",
    "diffusers.TensorParallelConfig._mesh",
    "diffusers.hooks.tensor_parallel._SUPPORTED_TP_DEVICES",
    "diffusers.hooks.tensor_parallel.resolve_tp_shard_specs",
    "diffusers.hooks.tensor_parallel.TPShardSpec.dim",
    "diffusers.hooks.tensor_parallel.TPShardSpec.block_sizes",
    "diffusers.hooks.tensor_parallel._local_shard",
    "diffusers.hooks.tensor_parallel.apply_tensor_parallel",
    "diffusers.models.cache_utils.CacheMixin._reset_stateful_cache",
    "diffusers.models.cache_utils.CacheMixin.is_cache_enabled",
    "diffusers.pipelines.flux.pipeline_flux",
    "accelerate.hooks.ModelHook",
    "accelerate.hooks.add_hook_to_module",
    "accelerate.utils.recursively_apply",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "transformers.PreTrainedModel.device",
)


def named_in(function: object) -> tuple[str, ...]:
    """Attributes that a function's own code names."""
    return inspect.unwrap(function).__code__.co_names


def in_stub(pattern: str) -> bool:
    """In torch's type stubs, which also name what only a build with CUDA has."""
    return bool(re.search(pattern, Path(torch.__file__).with_name("_C").joinpath("__init__.pyi").read_text()))


def in_cudart(name: str) -> bool:
    if not torch.version.cuda:
        pytest.skip("a torch without CUDA has no cudart, and no stub names its functions")
    return hasattr(torch._C._cudart, name)


def twin_without_init() -> bool:
    layer = torch.nn.Linear(2, 2)
    twin = object.__new__(torch.nn.Linear)
    twin.__dict__.update(layer.__dict__)
    return torch.equal(twin(torch.ones(2)), layer(torch.ones(2)))


def forward_replaced() -> bool:
    layer = torch.nn.Linear(2, 2)
    layer.forward = lambda _: "stand-in"
    replaced = layer(torch.ones(2)) == "stand-in" and "forward" in layer.__dict__
    del layer.forward
    return replaced and layer(torch.ones(2)).shape == (2,)


def fused_layers() -> bool:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model.fuse_qkv_projections()
    names = ("to_qkv", "to_q", "to_k", "to_v", "to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj")
    return all(hasattr(model.transformer_blocks[0].attn, name) for name in names)


def hooked() -> torch.nn.Module:
    return accelerate.hooks.add_hook_to_module(torch.nn.Linear(1, 1), accelerate.hooks.ModelHook())


def report_of_diffusers(folder: Path) -> list[str]:
    cls, few = diffusers.AutoencoderTiny, {"num_encoder_blocks": (1,), "num_decoder_blocks": (1,)}
    cls(encoder_block_out_channels=(4,), decoder_block_out_channels=(4,), **few).save_pretrained(folder)
    return sorted(cls.from_pretrained(folder, output_loading_info=True)[1])


def report_of_transformers() -> list[str]:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.CLIPTextConfig(**sizes, num_attention_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    state = {name: tensor.to("meta") for name, tensor in transformers.CLIPTextModel(config).state_dict().items()}
    return sorted(
        transformers.CLIPTextModel.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, device_map="meta"
        )[1]
    )


def quantized_parts() -> tuple[str, ...]:
    quantization = pytest.importorskip("torchao.quantization")
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model[0].weight.data) is not torch.Tensor
    return tuple(model[0].weight.__tensor_flatten__()[0])


def layers_of_bitsandbytes() -> ModuleType:
    return pytest.importorskip("bitsandbytes.nn.modules")


def parts_of_four_bits() -> set[str]:
    weight = layers_of_bitsandbytes().Params4bit(torch.randn(64, 64), requires_grad=False).to("cpu")
    return set(vars(weight.quant_state))


def replaced_quantizers(library: str) -> bool:
    layers_of_bitsandbytes()
    from diffusers.quantizers.bitsandbytes import bnb_quantizer
    from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

    known = {
        "diffusers": (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer),
        "transformers": (quantizer_bnb_4bit.Bnb4BitHfQuantizer, quantizer_bnb_8bit.Bnb8BitHfQuantizer),
    }
    return all("update_device_map" in vars(cls) and hasattr(cls, "validate_environment") for cls in known[library])


def parts_of_adapted() -> set[str]:
    """Return the names of the modules of a linear layer with an adapter x."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model, "x")
    return {name for name, _ in model[0].named_modules()}


REPORT = ["error_msgs", "mismatched_keys", "missing_keys", "unexpected_keys"]
CHECKS: dict[str, Callable[[Path], object]] = {  # each gets an empty folder
    **{name: lambda _, name=name: pkgutil.resolve_name(name) or True for name in NAMES},
    **{
        f"torch.nn.Module.{name}": lambda _, name=name: isinstance(vars(torch.nn.Linear(1, 1))[name], dict)
        for name in (
            "_parameters",
            "_buffers",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_always_called",
        )
    },
    "torch._C.__file__": lambda _: ctypes.CDLL(torch._C.__file__).omp_pause_resource_all,
    "torch._C._cuda_clearCublasWorkspaces": lambda _: in_stub(r"def _cuda_clearCublasWorkspaces\("),
    "torch.nn.Module.__dict__": lambda _: twin_without_init(),
    "torch.nn.Module.forward": lambda _: forward_replaced(),
    "vars(torch.nn.Module())": lambda _: {"_parameters", "_modules", "training"} <= vars(torch.nn.Module()).keys(),
    "torch.cuda.cudart().cudaHostRegister": lambda _: in_cudart("cudaHostRegister"),
    "torch.cuda.cudart().cudaHostUnregister": lambda _: in_cudart("cudaHostUnregister"),
    "torch.UntypedStorage._cdata": lambda _: torch.ones(1).untyped_storage()._cdata,
    "torch.cuda.get_device_properties().uuid": lambda _: in_stub(r"class _CudaDeviceProperties:\n(    .+\n)*    uuid:"),
    "diffusers.DiffusionPipeline._num_timesteps": lambda _: "_num_timesteps" in named_in(FLUX.__call__),
    "diffusers.DiffusionPipeline.current_timestep": lambda _: FLUX.current_timestep,
    "diffusers.DiffusionPipeline.vae_scale_factor": lambda _: "vae_scale_factor" in named_in(FLUX.__init__),
    "diffusers.DiffusionPipeline.default_sample_size": lambda _: "default_sample_size" in named_in(FLUX.__init__),
    "diffusers.DiffusionPipeline.check_inputs": lambda _: (
        "if height % (self.vae_scale_factor * 2) != 0" in inspect.getsource(FLUX.check_inputs)
    ),
    "diffusers.DiffusionPipeline.encode_prompt": lambda _: FLUX.encode_prompt,
    "diffusers.DiffusionPipeline._interrupt": lambda _: (
        {"_interrupt", "interrupt", "progress_bar"} <= set(named_in(inspect.unwrap(FLUX.__call__)))
    ),
    "diffusers.DiffusionPipeline.__call__": lambda _: (
        {"prompt", "height", "width", "num_inference_steps"} <= inspect.signature(FLUX.__call__).parameters.keys()
    ),
    "diffusers.SchedulerMixin.__dict__": lambda _: (
        {"_step_index", "_internal_dict"} <= vars(diffusers.FlowMatchEulerDiscreteScheduler()).keys()
    ),
    "diffusers.models.attention.AttentionModuleMixin.fuse_projections": lambda _: fused_layers(),
    "diffusers.utils.torch_utils.lru_cache_unless_export": lambda _: any(
        hasattr(cell.cell_contents, "cache_clear") for cell in vars(QwenEmbedRope)["_compute_video_freqs"].__closure__
    ),
    "diffusers.models.attention_dispatch.AttentionBackendName": lambda _: (
        {"_native_cudnn", "_sage_qk_int8_pv_fp16_cuda"} <= {backend.value for backend in AttentionBackendName}
    ),
    "diffusers.ModelMixin.from_pretrained": lambda folder: report_of_diffusers(folder) == REPORT,
    "diffusers.utils.SAFETENSORS_WEIGHTS_NAME": lambda _: (
        diffusers.utils.SAFETENSORS_WEIGHTS_NAME == "diffusion_pytorch_model.safetensors"
    ),
    "diffusers.ConfigMixin.to_json_string": lambda _: (
        "_class_name" in json.loads(diffusers.FlowMatchEulerDiscreteScheduler().to_json_string())
    ),
    "accelerate.hooks: _old_forward": lambda _: hooked()._old_forward,
    "accelerate.hooks: _hf_hook": lambda _: hooked()._hf_hook,
    "accelerate.dispatch_model: hf_device_map": lambda _: (
        accelerate.dispatch_model(torch.nn.Linear(1, 1), {"": "cpu"}, force_hooks=True).hf_device_map == {"": "cpu"}
    ),
    "transformers.PreTrainedModel.from_pretrained": lambda _: report_of_transformers() == REPORT,
    "transformers.utils.SAFE_WEIGHTS_NAME": lambda _: transformers.utils.SAFE_WEIGHTS_NAME == "model.safetensors",
    "transformers.tokenization_utils_base.VERY_LARGE_INTEGER": lambda _: (
        transformers.tokenization_utils_base.VERY_LARGE_INTEGER > 10**12
    ),
    "peft.tuners.lora.Linear": lambda _: {"base_layer", "lora_A.x"} <= parts_of_adapted(),
    "torchao: __tensor_flatten__": lambda _: quantized_parts(),
    "diffusers: BnB4BitDiffusersQuantizer.update_device_map": lambda _: replaced_quantizers("diffusers"),
    "transformers: Bnb4BitHfQuantizer.update_device_map": lambda _: replaced_quantizers("transformers"),
    "bitsandbytes: QuantState": lambda _: {"absmax", "code", "state2"} <= parts_of_four_bits(),
    "bitsandbytes: Linear8bitLt.init_8bit_state": lambda _: layers_of_bitsandbytes().Linear8bitLt.init_8bit_state,
    "bitsandbytes: Linear4bit.support_avx512bf16_for_cpu": lambda _: (
        "support_avx512bf16_for_cpu" in vars(layers_of_bitsandbytes().Linear4bit(64, 64))
    ),
    "torchao.logger": lambda _: pytest.importorskip("torchao").logger.name == "torchao",
}


@pytest.mark.parametrize("name", CHECKS)
def test_it_is_there(name: str, tmp_path: Path) -> None:
    assert CHECKS[name](tmp_path)

"""Tensor and context parallel: diffusers' own, with what they need to go with weights that stay in host memory.

Context parallel shares out the tokens of a picture: each GPU has all weights, streamed where memory is short. Tensor
parallel shares out the weights of attention and feed-forward; the rest, such as modulation, every GPU has whole, and it
may stay in host memory and pass through like a streamed model's.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from protocol.errors import BadRequest
from workers.weights.sharded import sharded


@dataclass(frozen=True, slots=True)
class Parallel:
    """A kind of parallelism, the number of processes that take part, and this one's `device`."""

    kind: Literal["tensor", "context"]
    size: int
    device: torch.device

    def model_class(self, cls: Any) -> Any:
        """The class to be loaded in place of a denoiser's; BadRequest for one that can't be shared out."""
        plan = "_tp_plan" if self.kind == "tensor" else "_cp_plan"
        if getattr(cls, plan, None) is None:
            raise BadRequest(
                f"{cls.__name__} can't be {self.kind} parallel in this diffusers.", "Choose another --placement."
            )
        if self.device.type == "cpu":
            tensor_parallel._SUPPORTED_TP_DEVICES = (*tensor_parallel._SUPPORTED_TP_DEVICES, "cpu")
        return type(
            cls.__name__, (cls,), {"_resolve_parallel_config": lambda model, config: self._resolve(model, config)}
        )

    def after_loading(self, module: Any) -> None:
        """Share out a module in host memory; BadRequest where its weights can't be shared out evenly."""
        if self.kind == "context":
            module.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.size))
        else:
            self._share_out(module)

    def _share_out(self, module: Any) -> None:
        """Share out as `from_pretrained` does with a parallel_config, but leave each rank's parts in the files."""
        heads = getattr(module.config, "num_attention_heads", self.size)
        if heads % self.size:
            raise BadRequest(f"{heads} heads of attention can't be shared out among {self.size}.", "Name fewer GPUs.")
        config = self._resolve(module, TensorParallelConfig(tp_degree=self.size)).tensor_parallel_config
        assert config is not None
        try:
            specs = tensor_parallel.resolve_tp_shard_specs(module, module._tp_plan, self.size)
        except ValueError as error:
            raise BadRequest(f"{error}", "Name fewer GPUs, or choose another --placement.") from error
        for name, spec in specs.items():
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            local = getattr(owner, leaf).data
            if spec.dim is not None:
                local = tensor_parallel._local_shard(local, spec.dim, spec.block_sizes, config._mesh)
            owner.register_parameter(leaf, sharded(local, spec.dim, config._mesh, self.device))
        tensor_parallel.apply_tensor_parallel(module, config, module._tp_plan, weights_already_sharded=True)

    def _resolve(self, model: Any, config: Any) -> ParallelConfig:
        """Resolve as diffusers does, but on a CPU, too, and leave what is not shared out in host memory."""
        if isinstance(config, ContextParallelConfig):
            config = ParallelConfig(context_parallel_config=config)
        elif isinstance(config, TensorParallelConfig):
            config = ParallelConfig(tensor_parallel_config=config)
        shape, names = ((self.size,), ("tp",)) if self.kind == "tensor" else ((1, self.size), ("ring", "ulysses"))
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        meet(mesh, self.device)
        config.setup(torch.distributed.get_rank(), self.size, self.device, mesh=mesh)
        model._parallel_config = config
        return config


def meet(mesh: DeviceMesh, device: torch.device) -> None:
    """Let all ranks exchange something in each way that models do: their libraries take buffers for it the first time.

    Once that is done, what a context takes can be measured.
    """
    for name in mesh.mesh_dim_names or ():
        group = mesh.get_group(name)
        mine = torch.zeros(group.size(), device=device)
        torch.distributed.all_reduce(mine, group=group)
        torch.distributed.all_to_all_single(torch.empty_like(mine), mine, group=group)
        torch.distributed.all_gather([torch.empty_like(mine) for _ in mine], mine, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)

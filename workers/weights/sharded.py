"""A rank's parts of the weights that tensor parallelism shares out, where their memory is."""

import math
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils.dlpack import from_dlpack


class LocalPart:
    """This rank's own part of a sharded parameter, to be moved as a plain parameter is: by its `data`."""

    def __init__(self, parameter: DTensor) -> None:
        self._parameter = parameter

    @property
    def data(self) -> torch.Tensor:
        return self._parameter._local_tensor

    @data.setter
    def data(self, place: torch.Tensor) -> None:
        """Set a tensor with its own storage on the same memory: torch.compile can't trace parts of a common one."""
        self._parameter._local_tensor = from_dlpack(place)


def sharded(local: torch.Tensor, dim: int | None, mesh: DeviceMesh, device: torch.device) -> torch.nn.Parameter:
    """A parameter on `device` of which `local` is this rank's part, left where it is; without a `dim`, all of it."""
    shape = [size * mesh.size() if index == dim else size for index, size in enumerate(local.shape)]
    placement: Placement = Replicate() if dim is None else Shard(dim)
    nothing = torch.empty(1, dtype=local.dtype, device=device).expand(local.shape)
    whole = DTensor.from_local(
        nothing, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=contiguous_strides(shape)
    )
    parameter = torch.nn.Parameter(whole, requires_grad=False)
    LocalPart(parameter).data = local  # type: ignore[arg-type]  # which a parameter of a DTensor is
    return parameter


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))

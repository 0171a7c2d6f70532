"""A rank's parts of the weights that tensor parallelism shares out, where their memory is."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement


class LocalPart:
    """What of a sharded parameter is this rank's own, to be moved as a plain parameter is: by its `data`."""

    def __init__(self, parameter: DTensor) -> None:
        self._parameter = parameter

    @property
    def data(self) -> torch.Tensor:
        return self._parameter._local_tensor

    @data.setter
    def data(self, place: torch.Tensor) -> None:
        self._parameter._local_tensor = place


def sharded(local: torch.Tensor, dim: int | None, mesh: DeviceMesh) -> torch.nn.Parameter:
    """A parameter of which `local` is this rank's part, left where it is; without a `dim` all ranks have it whole."""
    placement: Placement = Replicate() if dim is None else Shard(dim)
    whole = DTensor.from_local(torch.empty_like(local, device="meta"), mesh, [placement], run_check=False)
    parameter = torch.nn.Parameter(whole, requires_grad=False)
    LocalPart(parameter).data = local  # type: ignore[arg-type]  # which a parameter of a DTensor is
    return parameter

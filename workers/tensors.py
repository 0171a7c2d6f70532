"""Between torch's tensors and those that travel. Bits are never changed."""

import warnings
from collections.abc import Iterable, Mapping

import torch

from protocol.tensors import Tensor

DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32,
    "int64": torch.int64, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
    "float64": torch.float64, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Value = torch.Tensor | list[torch.Tensor]


def to_wire(name: str, tensor: torch.Tensor) -> Tensor:
    """A copy in host memory, C order; TypeError for a dtype that doesn't travel."""
    if tensor.dtype not in NAMES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, which does not travel")
    host = tensor.detach().to("cpu").contiguous()
    flat = host.reshape(-1).view(torch.uint8).numpy()
    return Tensor(name, NAMES[tensor.dtype], tuple(tensor.shape), flat.data)


def from_wire(tensor: Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor on a device; on the CPU it may share the received frame's memory, so it is not to be written."""
    dtype = DTYPES[tensor.dtype]
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(tensor.data, dtype=torch.uint8)
    aligned = flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype).reshape(tensor.shape).to(device)


def pack(values: Mapping[str, Value]) -> list[Tensor]:
    """Named tensors and lists of tensors, the items of a list as `name.0`, `name.1` …"""
    packed: list[Tensor] = []
    for name, value in values.items():
        if isinstance(value, list):
            packed += [to_wire(f"{name}.{i}", item) for i, item in enumerate(value)]
        else:
            packed.append(to_wire(name, value))
    return packed


def unpack(tensors: Iterable[Tensor], device: torch.device | str) -> dict[str, Value]:
    """The inverse of `pack`."""
    values: dict[str, Value] = {}
    for tensor in tensors:
        name, dot, _ = tensor.name.partition(".")
        if dot:
            items = values.setdefault(name, [])
            assert isinstance(items, list)
            items.append(from_wire(tensor, device))
        else:
            values[name] = from_wire(tensor, device)
    return values


def flat_bytes(tensor: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """A contiguous tensor's own memory as flat uint8; `length` bytes of it from where it begins in its storage."""
    start = tensor.storage_offset() * tensor.element_size()
    size = tensor.nbytes if length is None else length
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), start, (size,), (1,))

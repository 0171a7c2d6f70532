"""Tensors as they travel: a name, a dtype from a closed table, a shape, and raw little-endian bytes in C order."""

import math
from dataclasses import dataclass

from protocol.errors import ProtocolError

Buffer = bytes | bytearray | memoryview

ITEMSIZE: dict[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip

CHECKPOINT = "checkpoint:"  # begins the names of the tensors that a checkpoint is made of
MAX_DIMENSIONS = 8
MAX_NAME = 128


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor, opaque to everything but a worker.

    `data` holds exactly prod(shape) × itemsize bytes; it may be a view of a received frame, so it is never written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Buffer

    @property
    def nbytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, memoryview) else len(self.data)

    @property
    def spec(self) -> tuple[str, str, tuple[int, ...]]:
        """Name, dtype and shape, as in a message's header."""
        return self.name, self.dtype, self.shape


def checked(spec: object, data: Buffer) -> Tensor:
    """The tensor that a received header entry and frame make, or ProtocolError. Allocates nothing."""
    match spec:
        case (str(name), str(dtype), tuple(shape)) if 0 < len(name) <= MAX_NAME:
            pass
        case _:
            raise ProtocolError("A tensor's header is not (name, dtype, shape).")
    if dtype not in ITEMSIZE:
        raise ProtocolError(f"Tensor {name!r} has dtype {dtype[:32]!r}.", f"Known are {', '.join(ITEMSIZE)}.")
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
        raise ProtocolError(f"Tensor {name!r} has no valid shape.", f"At most {MAX_DIMENSIONS} sizes of 0 or more.")
    expected = math.prod(shape) * ITEMSIZE[dtype]
    tensor = Tensor(name, dtype, shape, data)
    if expected != tensor.nbytes:
        raise ProtocolError(
            f"Tensor {name!r} of {dtype} {shape} needs {expected} bytes; its frame has {tensor.nbytes}."
        )
    return tensor

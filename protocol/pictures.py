"""Pictures that jobs begin from, by content: pixels as tensors, named by their digests."""

import hashlib

from protocol.errors import BadRequest
from protocol.tensors import Tensor

MAX_PIXELS = 1 << 26  # of one picture: 8192 x 8192
IMAGE, MASK = "image", "mask"  # how the names of a task's pictures begin


def digest_of(shape: tuple[int, ...], data: bytes | bytearray | memoryview) -> str:
    """Return the digest of a picture's pixels and shape: 64 hex digits."""
    found = hashlib.sha256(repr(tuple(shape)).encode())
    found.update(data)
    return found.hexdigest()


def check_picture(tensor: Tensor) -> None:
    """Raise BadRequest for what is no uint8 picture (height, width, 1 or 3), or not the one that its name says."""
    match tensor.dtype, tensor.shape:
        case "uint8", (height, width, 1 | 3) if 0 < height * width <= MAX_PIXELS:
            if digest_of(tensor.shape, tensor.data) == tensor.name:
                return
    raise BadRequest(
        f"An input picture of {tensor.dtype} {list(tensor.shape)} is not what it is said to be.",
        f"It is uint8 (height, width, 3), at most {MAX_PIXELS} pixels, and named by its digest.",
    )

"""Pictures that jobs begin from, by content: pixels as tensors, named by their digests."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from protocol.errors import BadRequest
from protocol.tensors import Tensor

MAX_PIXELS = 1 << 26  # of one picture: 8192 x 8192
MAX_VIDEO_PIXELS = 80 << 20  # of all frames of a video: 91 of 1280 x 720
IMAGE, MASK, CONTROL, IP_IMAGE, VIDEO = (
    "image",
    "mask",
    "control",
    "ip_image",
    "video",
)  # how the names of a task's pictures begin
PICTURES = "pictures"  # name of the tensors that a job's last visit gives
SOUND, SOUND_RATE = "sound", "sound_rate"  # names of the tensors of videos' sound
PART_BYTES = 4 << 20  # of pictures, or of a video's frames, in one message


def is_given_picture(tensor: Tensor) -> bool:
    """Return whether a tensor beside a task is a picture that the job begins from."""
    return tensor.name in (MASK, CONTROL, IP_IMAGE) or tensor.name.startswith((f"{IMAGE}:", f"{VIDEO}:"))


def named_pictures(
    images: Sequence[str],
    mask: str | None,
    control: str | None,
    ip_image: str | None,
    videos: Sequence[tuple[str, str]],
) -> dict[str, str]:
    """Return the digests of the pictures and videos that a job begins from, by their names beside its tasks."""
    found = {f"{IMAGE}:{number}": digest for number, digest in enumerate(images)}
    found |= {name: digest for name, digest in ((MASK, mask), (CONTROL, control), (IP_IMAGE, ip_image)) if digest}
    return found | {f"{VIDEO}:{name}": digest for name, digest in videos}


def is_of_its_kind(name: str, shape: Sequence[int]) -> bool:
    """Return whether what goes by a name beside a job's tasks has the shape that it must have."""
    channels = 1 if name == MASK else 3
    return len(shape) == (4 if name.startswith(f"{VIDEO}:") else 3) and shape[-1] == channels


def extent_of(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[int, int] | None, int | None]:
    """Return the size of the first picture or video that a job begins from, and the frames of its first video.

    `shapes` are those of its pictures by their names. (width, height) in pixels; None where there is none.
    """
    begins = [shape for name, shape in shapes.items() if name.startswith((f"{IMAGE}:", f"{VIDEO}:"))]
    size = (begins[0][-2], begins[0][-3]) if begins else None
    return size, next((shape[0] for shape in begins if len(shape) == 4), None)


def as_given(named: Mapping[str, str], pictures: Mapping[str, Tensor]) -> list[Tensor]:
    """Return pictures, of those that are there by digest, named for a job's tasks; KeyError."""
    return [replace(pictures[digest], name=name) for name, digest in named.items()]


def pictures_among(tensors: Sequence[Tensor]) -> Tensor:
    """Return the pictures, or a video's frames, of a job's last visit as one tensor, uint8 (n, height, width, 3)."""
    return joined([tensor for tensor in tensors if tensor.name == PICTURES])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join parts of pictures, uint8 (n, height, width, 3), to one tensor."""
    if len(parts) == 1:
        return parts[0]
    name, dtype, (_, *size) = parts[0].spec
    count = sum(part.shape[0] for part in parts)
    return Tensor(name, dtype, (count, *size), b"".join(part.data for part in parts))


def digest_of(shape: tuple[int, ...], data: bytes | bytearray | memoryview) -> str:
    """Return the digest of a picture's pixels and shape: 64 hex digits."""
    found = hashlib.sha256(repr(tuple(shape)).encode())
    found.update(data)
    return found.hexdigest()


def check_picture(tensor: Tensor) -> None:
    """Raise BadRequest for what is no uint8 picture (height, width, 1 or 3), or not the one that its name says.

    Or video, (frames, height, width, 3).
    """
    match tensor.dtype, tensor.shape:
        case ("uint8", (height, width, 1 | 3)) if 0 < height * width <= MAX_PIXELS:
            fits = True
        case ("uint8", (frames, height, width, 3)) if 0 < frames * height * width <= MAX_VIDEO_PIXELS:
            fits = True
        case _:
            fits = False
    if fits and digest_of(tensor.shape, tensor.data) == tensor.name:
        return
    raise BadRequest(
        f"An input picture of {tensor.dtype} {list(tensor.shape)} is not what it is said to be.",
        f"It is uint8 (height, width, 3), at most {MAX_PIXELS} pixels, or (frames, height, width, 3), at most "
        f"{MAX_VIDEO_PIXELS}; and named by its digest.",
    )

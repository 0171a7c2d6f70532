"""From a user's picture to the pixels that a stack takes: upright, in sRGB, without alpha."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from protocol.errors import BadRequest
from protocol.pictures import MAX_PIXELS, MAX_VIDEO_PIXELS, digest_of
from protocol.tensors import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Given: TypeAlias = "str | os.PathLike[str] | bytes | Image"
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Inputs:
    """The pictures and videos that a request begins from, as pixels."""

    images: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    control: Tensor | None = None
    ip_image: Tensor | None = None
    videos: tuple[tuple[str, Tensor], ...] = ()  # by names of the pipeline's call

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of a request's digests."""
        singles = (one for one in (self.mask, self.control, self.ip_image) if one is not None)
        return (*self.images, *singles, *(video for _, video in self.videos))

    @property
    def fields(self) -> dict[str, Any]:
        """The request's fields that name them, for those that are there."""
        singles = {"mask": self.mask, "control": self.control, "ip_image": self.ip_image}
        found: dict[str, Any] = {name: one.name for name, one in singles.items() if one is not None}
        if self.images:
            found["images"] = tuple(image.name for image in self.images)
        if self.videos:
            found["videos"] = tuple((name, video.name) for name, video in self.videos)
        return found


def picture_of(given: Given, mask: bool = False, blur: float = 0) -> Tensor:
    """Return a picture's pixels, uint8 (height, width, 3), or of a mask (height, width, 1), named by their digest.

    `given` is a path, a file's bytes or a Pillow image. It is turned as its EXIF says, and converted to sRGB. A mask's
    edge is softened by a Gaussian blur of a radius in pixels, as by diffusers' VaeImageProcessor.

    Raises:
        BadRequest: it can't be read, moves, or is too large.
    """
    if mask:
        return tensor_of(softened(upright(given).convert("L"), blur))
    return tensor_of(in_srgb(upright(given)).convert("RGB"))


def video_of(given: "str | os.PathLike[str] | bytes | Sequence[Image]") -> Tensor:
    """Return a video's frames, uint8 (frames, height, width, 3), named by their digest.

    `given` is the path or the bytes of a file that PyAV can read, or frames as Pillow images.

    Raises:
        BadRequest: it can't be read, holds no video, or is too large.
    """
    import numpy as np

    if isinstance(given, str | os.PathLike | bytes):
        frames = decoded(given)
    else:
        frames = (np.asarray(frame.convert("RGB")) for frame in given)
    found: list[np.ndarray] = []
    pixels = 0
    for frame in frames:
        pixels += frame.shape[0] * frame.shape[1]
        if pixels > MAX_VIDEO_PIXELS:
            raise BadRequest(
                f"{told(given)} has too many pixels in its frames.",
                f"At most {MAX_VIDEO_PIXELS} are taken, {MAX_VIDEO_PIXELS // (frame.shape[0] * frame.shape[1])} frames "
                "of its size: make it shorter, or smaller.",
            )
        if found and frame.shape != found[0].shape:
            raise BadRequest(f"{told(given)} has frames of several sizes.", "Give frames of one size.")
        found.append(frame)
    if not found:
        raise BadRequest(f"{told(given)} has no frames.", "Give a video.")
    shape, data = (len(found), *found[0].shape), b"".join(frame.tobytes() for frame in found)
    return Tensor(digest_of(shape, data), "uint8", shape, data)


def split_video(text: str) -> tuple[str, str]:
    """Split `[NAME=]FILE` into the name of a pipeline's argument, "" for the first that it takes, and the path."""
    name, equals, path = text.partition("=")
    if Path(text).exists():
        return "", text
    return (name, path) if equals and name.isidentifier() and name.isascii() else ("", text)


def decoded(given: "str | os.PathLike[str] | bytes") -> "Iterator[np.ndarray]":
    """Yield the frames of a video file, uint8 (height, width, 3), upright; BadRequest."""
    import av
    import numpy as np

    try:
        # What comes as bytes may be anybody's: only containers that name no other files are tried.
        source: Any = (io.BytesIO(given), "r", container_of(given)) if isinstance(given, bytes) else (os.fspath(given),)
        with av.open(*source) as file:
            if not file.streams.video:
                raise BadRequest(f"{told(given)} holds no video.", "Give one: mp4, webm, gif …")
            for frame in file.decode(video=0):
                picture = frame.to_ndarray(format="rgb24")
                yield np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))
    except FileNotFoundError as error:
        raise BadRequest(f"There is no file {told(given)}.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadRequest(f"{told(given)} can't be read as a video.", "mp4, webm and gif can.") from error


def container_of(file: bytes) -> str:
    """Return FFmpeg's name for the container that a file begins as; BadRequest for one that is not taken."""
    if file[4:8] == b"ftyp":
        return "mov"
    if file.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if file.startswith(b"GIF8"):
        return "gif"
    raise BadRequest("The video can't be read.", "mp4, mov, webm, mkv and gif can.")


def alpha_mask_of(given: Given, blur: float = 0) -> Tensor:
    """Return a mask of what is transparent in a picture, as `picture_of` returns masks; BadRequest where nothing is."""
    from PIL import ImageChops

    image = upright(given)
    if not image.has_transparency_data:
        raise BadRequest(f"{told(given)} has no alpha channel.", "Give a mask of its own: --mask FILE.")
    return tensor_of(softened(ImageChops.invert(image.convert("RGBA").getchannel("A")), blur))


def softened(mask: "Image", blur: float) -> "Image":
    from PIL import ImageFilter

    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def tensor_of(pixels: "Image") -> Tensor:
    data = pixels.tobytes()
    shape = (pixels.height, pixels.width, 1 if pixels.mode == "L" else 3)
    return Tensor(digest_of(shape, data), "uint8", shape, data)


def told(given: object) -> str:
    """Return how to call what a person gave."""
    if isinstance(given, str | os.PathLike):
        return repr(os.fspath(given))
    return "the video" if isinstance(given, Sequence) and not isinstance(given, bytes) else "the picture"


def upright(given: Given) -> "Image":
    """Read a picture, and turn it as its EXIF says; BadRequest."""
    from PIL import Image, ImageOps

    try:
        with opened(given) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise BadRequest(f"{told(given)} has {frames} frames.", "Give one picture.")
            return ImageOps.exif_transpose(image)
    except BadRequest:
        raise
    except Image.DecompressionBombError as error:
        raise BadRequest(
            f"{told(given)} has too many pixels.", f"At most {MAX_PIXELS} are taken: make it smaller."
        ) from error
    except FileNotFoundError as error:
        raise BadRequest(f"There is no file {told(given)}.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadRequest(f"{told(given)} can't be read as a picture.", f"{', '.join(FORMATS)} can.") from error


def opened(given: Given) -> "Image":
    from PIL import Image

    if isinstance(given, Image.Image):
        return given.copy()
    return Image.open(io.BytesIO(given) if isinstance(given, bytes) else Path(given), formats=FORMATS)


def in_srgb(image: "Image") -> "Image":
    """Convert a picture with a color profile of its own to sRGB; one whose profile can't be read stays as it is."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode="RGBA" if image.mode == "RGBA" else "RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted or image

"""From a user's picture to the pixels that a stack takes: upright, in sRGB, without alpha."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import BadRequest
from protocol.pictures import MAX_PIXELS, digest_of
from protocol.tensors import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")


def picture_of(given: "str | os.PathLike[str] | bytes | Image", mask: bool = False) -> Tensor:
    """Return a picture's pixels, uint8 (height, width, 3), or of a mask (height, width, 1), named by their digest.

    `given` is a path, a file's bytes or a Pillow image. It is turned as its EXIF says, and converted to sRGB.

    Raises:
        BadRequest: it can't be read, moves, or is too large.
    """
    from PIL import Image, ImageOps

    where = "the picture" if isinstance(given, bytes | Image.Image) else repr(os.fspath(given))
    try:
        with opened(given) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise BadRequest(f"{where} has {frames} frames.", "Give one picture.")
            upright = ImageOps.exif_transpose(image)
            pixels = upright.convert("L") if mask else in_srgb(upright).convert("RGB")
    except BadRequest:
        raise
    except Image.DecompressionBombError as error:
        raise BadRequest(
            f"{where} has too many pixels.", f"At most {MAX_PIXELS} are taken: make it smaller."
        ) from error
    except FileNotFoundError as error:
        raise BadRequest(f"There is no file {where}.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise BadRequest(f"{where} can't be read as a picture.", f"{', '.join(FORMATS)} can.") from error
    data = pixels.tobytes()
    shape = (pixels.height, pixels.width, 1 if mask else 3)
    return Tensor(digest_of(shape, data), "uint8", shape, data)


def opened(given: "str | os.PathLike[str] | bytes | Image") -> "Image":
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

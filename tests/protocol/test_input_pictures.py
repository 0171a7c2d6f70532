"""A user's picture is read, turned and converted before it is sent, and a stack takes no others."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from protocol.client.input_pictures import alpha_mask_of, picture_of
from protocol.errors import BadRequest
from protocol.pictures import check_picture
from protocol.tensors import Tensor
from tests.pictures import noise


def pixels(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_path_bytes_and_an_image_are_one_picture(format: str, tmp_path: Path) -> None:
    image, path = noise((5, 3)), tmp_path / "picture"
    image.save(path, format, lossless=True)
    found = [picture_of(given) for given in (path, str(path), path.read_bytes(), image)]
    assert all(one == found[0] for one in found)
    assert np.array_equal(pixels(found[0]), np.asarray(image))
    check_picture(found[0])


def test_it_is_turned_as_its_exif_says_and_alpha_goes() -> None:
    image = noise((5, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    assert np.array_equal(pixels(picture_of(file.getvalue())), np.asarray(image.rotate(-90, expand=True)))
    transparent = image.copy()
    transparent.putalpha(0)
    assert np.array_equal(pixels(picture_of(transparent)), np.asarray(image))


def test_colors_of_another_profile_become_srgb() -> None:
    image = Image.new("RGB", (2, 2), (200, 100, 50))
    file = io.BytesIO()
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"rXYZ", b"????")
    swapped = swapped.replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")  # its red is sRGB's blue
    image.save(file, "PNG", icc_profile=swapped)
    assert np.allclose(pixels(picture_of(file.getvalue())), np.asarray(image)[..., ::-1], atol=2)
    file = io.BytesIO()
    image.save(file, "PNG", icc_profile=b"none")
    assert np.array_equal(pixels(picture_of(file.getvalue())), np.asarray(image))


def test_a_mask_has_one_channel() -> None:
    assert picture_of(noise((5, 3)), mask=True).shape == (3, 5, 1)


def test_what_is_not_as_it_is_named_is_refused() -> None:
    good = picture_of(noise((5, 3)))
    for bad in (
        replace(good, name="0" * 64),
        replace(good, data=bytes(45)),
        replace(good, shape=(3, 3, 5)),
        replace(good, dtype="int8"),
        replace(good, shape=(45,)),
    ):
        with pytest.raises(BadRequest, match="not what it is said to be"):
            check_picture(bad)


def test_a_mask_of_what_is_transparent_softened_as_diffusers_does() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = noise((16, 16)).convert("RGBA")
    alpha = Image.new("L", (16, 16), 255)
    alpha.paste(0, (8, 0, 16, 16))
    image.putalpha(alpha)
    white = Image.new("L", (16, 16), 0)
    white.paste(255, (8, 0, 16, 16))
    assert np.array_equal(pixels(alpha_mask_of(image))[..., 0], np.asarray(white))
    blurred = VaeImageProcessor.blur(white, blur_factor=3)
    assert np.array_equal(pixels(alpha_mask_of(image, 3))[..., 0], np.asarray(blurred))
    assert np.array_equal(pixels(picture_of(white, mask=True, blur=3))[..., 0], np.asarray(blurred))
    with pytest.raises(BadRequest, match="no alpha channel"):
        alpha_mask_of(noise((16, 16)))

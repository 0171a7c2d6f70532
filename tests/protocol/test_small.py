"""Units, endpoints, errors and PNG metadata."""

from pathlib import Path

import pytest

from protocol.client.picture_files import metadata_of, read_recipe, save_picture, to_images
from protocol.errors import BY_CODE, BadRequest, TriptychError, from_wire
from protocol.sockets import check_endpoint
from protocol.tensors import Tensor
from protocol.units import format_bytes, parse_bytes
from tests.protocol.test_recipe import recipe


@pytest.mark.parametrize(
    ("text", "count"), [("16GB", 16 * 10**9), ("16 gib", 16 << 30), ("1.5MB", 1_500_000), ("7", 7)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "16 XB", "1e9"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(BadRequest, match="16GB"):
        parse_bytes(text)


def test_amounts_as_people_read_them() -> None:
    assert [format_bytes(n) for n in (5, 2_000, 1_600_000_000)] == ["5 B", "2.0 KB", "1.6 GB"]


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5555", "tcp://localhost:1", "tcp://[::1]:7", "ipc:///tmp/x"])
def test_local_endpoints_are_taken(endpoint: str) -> None:
    check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.1.2.3:1", "tcp://127.0.0.1", "x", "ipc://"]
)
def test_endpoints_beyond_loopback_are_refused(endpoint: str) -> None:
    with pytest.raises(BadRequest):
        check_endpoint(endpoint)


def test_every_error_crosses_the_wire_as_itself() -> None:
    for code, cls in BY_CODE.items():
        assert type(from_wire(code, "m", "h")) is cls
    assert type(from_wire("of a later version", "m", "h")) is TriptychError


def test_a_png_carries_its_recipe(tmp_path: Path) -> None:
    made = recipe(prompt="a cät\nwith two lines", cfg_scale=2.0, negative_prompt="dog", num_images=2)
    pixels = bytes(range(2 * 4 * 4 * 3))
    first, second = to_images(Tensor("pictures", "uint8", (2, 4, 4, 3), pixels))
    assert first.tobytes() + second.tobytes() == pixels
    save_picture(second, tmp_path / "x.png", metadata_of(made, "job", 1))
    found = read_recipe(tmp_path / "x.png")
    assert (found.recipe, found.index) == (made, 1)


def test_a_picture_without_a_recipe_is_told_so(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "y.png").write_bytes(b"not a picture")
    for name in ("x.png", "y.png", "missing.png"):
        with pytest.raises(BadRequest):
            read_recipe(tmp_path / name)

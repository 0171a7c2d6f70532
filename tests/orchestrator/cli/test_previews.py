"""Previews on a terminal."""

import base64
import io
import re

import pytest
from PIL import Image
from rich.console import Console

from orchestrator.cli.previews import CHUNK, COLUMNS, Placed, blocks, has_graphics


def shown(drawn: object) -> str:
    file = io.StringIO()
    Console(file=file, force_terminal=True, color_system="truecolor", width=80).print(drawn)
    return file.getvalue()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"TERM": "xterm-kitty"}, True),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, True),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, True),
        ({"TERM": "xterm-256color"}, False),
        ({}, False),
    ],
)
def test_terminals_with_graphics_are_known_by_their_names(environment: dict[str, str], found: bool) -> None:
    assert has_graphics(environment) == found


def test_half_blocks_show_two_pixels_a_character() -> None:
    image = Image.new("RGB", (4, 2), "red")
    image.paste("blue", (0, 1, 4, 2))
    text = blocks(image)
    lines = text.plain.splitlines()
    assert {len(line) for line in lines} == {COLUMNS}
    assert len(lines) == COLUMNS // 4
    assert "\x1b[38;2;255;0;0" in shown(text)


def test_kitty_gets_the_picture_in_pieces_and_room_for_it() -> None:
    image = Image.effect_noise((200, 100), 80).convert("RGB")
    placed = Placed(image)
    text = shown(placed)
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert len(pieces) > 1
    assert all(len(piece) <= CHUNK for _, piece in pieces)
    assert [settings[-3:] for settings, _ in pieces] == ["m=1"] * (len(pieces) - 1) + ["m=0"]
    file = base64.b64decode("".join(piece for _, piece in pieces))
    assert Image.open(io.BytesIO(file)).size == (200, 100)
    assert text.count("\n") >= placed.rows

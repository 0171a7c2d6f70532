"""Previews on a terminal."""

import base64
import io
import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console
from rich.live import Live

from orchestrator.cli import previews
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


ASKS = "from orchestrator.cli.previews import has_sixels; print(f'sixels: {has_sixels()}', flush=True)"


@pytest.mark.parametrize(("answer", "found"), [(b"\x1b[?62;4;22c", True), (b"\x1b[?62;22c", False), (b"", False)])
def test_a_terminal_is_asked_whether_it_has_sixels(answer: bytes, found: bool) -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", ASKS], stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    seen = b""
    while b"sixels: " not in seen or not seen.endswith(b"\n"):
        seen += os.read(ours, 1000)
        if seen.endswith(b"\x1b[c") and answer:
            os.write(ours, answer)
    assert process.wait(10) == 0
    os.close(ours)
    assert f"sixels: {found}".encode() in seen


def test_sixels_are_drawn_where_the_terminal_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "has_sixels", lambda: True)
    monkeypatch.setattr(previews, "has_graphics", lambda environment: False)
    for size in ((64, 32), (32, 128)):
        picture = previews.drawn(Image.new("RGB", size, "red"))
        text = shown(picture)
        assert re.search(r"\x1bP[0-9;]*q", text)
        assert text.index("\x1bP") < text.rindex("\n")  # room for it comes after it, as rich may cut lines off
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, width=80, height=20)
        with Live(previews.drawn(Image.new("RGB", size, "red")), console=console, auto_refresh=False):
            pass
        assert "\x1bP" in file.getvalue()

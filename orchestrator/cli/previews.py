"""Previews of jobs that are waited for: as files, and on the terminal by kitty's graphics, sixels or half blocks."""

import base64
import functools
import io
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.display import Display
from protocol.client.client import Client
from protocol.errors import BadRequest
from protocol.messages.client import JobEvent

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

COLUMNS = 48  # of a preview on a terminal
BESIDE = 6  # lines of a terminal that are left beside a picture
CHUNK = 4096  # characters of a picture in one of kitty's escapes
IMAGE = 7431  # its number there, so that the next one takes its place
WITH_GRAPHICS = ("xterm-kitty", "xterm-ghostty", "WezTerm", "ghostty")  # names of terminals that have kitty's
HALF = "▀"  # a character's upper half, in its own color; the lower one is its background's


@dataclass(slots=True)
class PreviewWatch:
    """Looks at previews while jobs are denoised: shown on a display, or written to a folder, or both."""

    client: Client
    shown: bool
    folder: Path | None
    _steps: dict[str, int] = field(default_factory=dict)  # of the last preview, by job

    def __post_init__(self) -> None:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadRequest(f"{str(self.folder)!r} can't be made: {error.strerror}.", "Choose another.") from error

    def see(self, event: JobEvent, display: Display) -> None:
        """Look at a job again where it has moved."""
        if event.state != "denoise" or not event.running or not (self.shown or self.folder):
            return
        found = self.client.preview(event.job)
        if not found.file or self._steps.get(event.job) == found.step:
            return
        self._steps[event.job] = found.step
        if self.folder:
            (self.folder / f"{event.job}-{found.step:04d}.jpg").write_bytes(found.file)
        if self.shown:
            from PIL import Image

            with Image.open(io.BytesIO(found.file), formats=("JPEG",)) as image:
                display.picture(drawn(image.convert("RGB")))


def drawn(image: "Image") -> "RenderableType":
    """Return a picture as this terminal shows it best."""
    if has_graphics(os.environ):
        return Placed(image)
    return Sixels(image) if has_sixels() else blocks(image)


@functools.cache
def has_sixels() -> bool:
    """Ask the terminal whether it shows sixels."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        from textual_image.renderable.sixel import query_terminal_support

        return query_terminal_support()
    except Exception:  # what asks a terminal meets whatever a terminal may be
        return False


def has_graphics(environment: Mapping[str, str]) -> bool:
    """Return whether the terminal shows pictures as kitty does, by what it calls itself."""
    named = (environment.get("TERM", ""), environment.get("TERM_PROGRAM", ""))
    return "KITTY_WINDOW_ID" in environment or any(name in WITH_GRAPHICS for name in named)


class Placed:
    """A picture for rich that a terminal with kitty's graphics draws itself, over lines that are left empty for it."""

    def __init__(self, image: "Image") -> None:
        file = io.BytesIO()
        image.save(file, "PNG")
        text = base64.b64encode(file.getvalue()).decode()
        self.rows = max(1, round(COLUMNS * image.height / image.width / 2))
        chunks = [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
        first = f"a=T,f=100,i={IMAGE},p=1,c={COLUMNS},r={self.rows},C=1,q=2,"
        self.escapes = "".join(
            f"\x1b_G{'' if number else first}m={int(number + 1 < len(chunks))};{chunk}\x1b\\"
            for number, chunk in enumerate(chunks)
        )

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Segment]":
        from rich.segment import ControlType, Segment

        yield Segment(self.escapes, None, [(ControlType.HOME,)])  # a control's text takes no room
        for _ in range(self.rows):
            yield Segment.line()


class Sixels:
    """A picture for rich that a terminal draws from sixels, over lines that are left empty for it."""

    def __init__(self, image: "Image") -> None:
        self._image = image
        self._escapes, self._rows = "", 0  # once they are known

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Segment]":
        from rich.segment import ControlType, Segment

        if not self._escapes:
            self._draw(console)
        yield Segment(self._escapes, None, [(ControlType.HOME,)])  # a control's text takes no room
        for _ in range(self._rows):
            yield Segment.line()

    def _draw(self, console: "Console") -> None:
        from textual_image.renderable.sixel import Image as Drawn

        room = max(4, console.height - BESIDE)  # lines
        columns = max(1, min(COLUMNS, int(2 * room * self._image.width / self._image.height)))
        texts = [segment.text for segment in console.render(Drawn(self._image, width=columns, height="auto"))]
        sixels = next(text for text in texts if text.startswith("\x1bP"))
        self._rows = "".join(texts[: texts.index(sixels)]).count("\n")
        down = "\n" * self._rows  # so that a terminal that scrolls does so before
        self._escapes = f"{down}\x1b[{self._rows}A\x1b7{sixels}\x1b8"


def blocks(image: "Image") -> "Text":
    """Return a picture as text, two of its pixels to a character."""
    from rich.text import Text

    rows = max(1, round(COLUMNS * image.height / image.width / 2)) * 2
    small = image.resize((COLUMNS, rows))
    found = Text()
    for y in range(0, rows, 2):
        for x in range(COLUMNS):
            upper, lower = small.getpixel((x, y)), small.getpixel((x, y + 1))
            found.append(HALF, f"{color(upper)} on {color(lower)}")
        found.append("\n")
    return found


def color(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    return f"#{red:02x}{green:02x}{blue:02x}"

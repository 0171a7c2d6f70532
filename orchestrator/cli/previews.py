"""Previews of jobs that are waited for: on the terminal by half blocks, and as files."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.display import Display
from protocol.client.client import Client
from protocol.errors import BadRequest
from protocol.messages.client import JobEvent

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.text import Text

COLUMNS = 48  # of a preview on a terminal
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
                display.picture(blocks(image.convert("RGB")))


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

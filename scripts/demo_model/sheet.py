"""Show what the demo model can do, in one sheet: a prompt, a picture to begin from, and a part that is painted anew.

python -m scripts.demo_model.sheet demo.png
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image, ImageDraw

from protocol.client.client import Client

SIDE, MARGIN, LINE = 128, 12, 16  # pixels
PROMPT = "a large red circle at the top left and a small blue star at the bottom right on a yellow background"
CHANGED = "a large green circle at the top left and a small blue star at the bottom right on a yellow background"
REPAINTED = "a large red circle at the top left and a small green ring at the bottom right on a yellow background"


def lower_right() -> Image.Image:
    """A mask of the lower right quarter."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 2, SIDE // 2, SIDE, SIDE))
    return mask


def make(client: Client) -> list[tuple[str, Image.Image]]:
    """Make the pictures, each with its title; the later ones begin from the first."""

    def picture(prompt: str, **options: object) -> Image.Image:
        return client.pictures(client.wait(client.submit(prompt, **options).id).id)[0]

    first = picture(PROMPT, seed=1)
    return [
        ("a prompt", first),
        ("--image, strength 0.8", picture(CHANGED, seed=2, images=first, strength=0.8)),
        ("--image, --mask", picture(REPAINTED, seed=2, images=first, mask=lower_right(), strength=0.95)),
    ]


def sheet(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Lay pictures side by side, each above its title."""
    step = SIDE + MARGIN
    made = Image.new("RGB", (step * len(pictures) + MARGIN, SIDE + 2 * MARGIN + LINE), "white")
    draw = ImageDraw.Draw(made)
    for i, (title, picture) in enumerate(pictures):
        made.paste(picture, (MARGIN + i * step, MARGIN))
        draw.text((MARGIN + i * step, MARGIN + SIDE + 4), title, fill="black")
    return made


@click.command(help=__doc__.split("\n")[0])
@click.argument("output", type=click.Path(path_type=Path))
def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orchestrator.cli", "up", "--state", folder, "--json"]
        stack = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert stack.stdout is not None
            if not stack.stdout.readline():
                raise click.ClickException("The stack did not start; see: triptych doctor")
            with Client(folder, timeout=60) as client:
                sheet(make(client)).save(output)
        finally:
            stack.terminate()
            stack.wait()
    print(output)


if __name__ == "__main__":
    main()

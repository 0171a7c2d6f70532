"""Score the demo model on prompts whose attribute combinations training never showed.

    python -m scripts.demo_model.evaluate workers/demo_model

A prompt counts as right only if all its objects are. An object's pixels are those that differ from the background,
in the cell of the picture nearest to the place that the prompt asked for. Color: the palette's nearest to their
median. Place: the nearest of the nine to their middle. Size: the nearest of the three. Shape: the one of the eight
whose drawn mask, fitted in place and size, overlaps them most, and by at least 0.7.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from scripts.demo_model import scenes

PALETTE = np.array(list(scenes.COLORS.values()), dtype=np.float64)
SHARE_OF_SHORT = np.array(list(scenes.RADII.values()))


@dataclass(frozen=True, slots=True)
class Verdict:
    color: bool
    shape: bool
    place: bool
    size: bool
    overlap: float  # intersection over union with the drawn mask of the shape that was asked for


def held_out_prompts(count: int, seed: int) -> list[tuple[str, scenes.Scene]]:
    """Fully given, non-overlapping scenes, each with at least one held-out object; half in loose wording."""
    rng = random.Random(seed)
    found: list[tuple[str, scenes.Scene]] = []
    while len(found) < count:
        scene = scenes.random_scene(rng, full=True)
        held = [scenes.held_out(t.color, t.shape, t.size, t.place) for t in scene.things]
        if any(held) and not scenes.overlaps(scene):
            found.append((scenes.wording(scene, rng, plain=len(found) % 2 == 0), scene))
    return found


def judge(picture: np.ndarray, scene: scenes.Scene, atlas: torch.Tensor) -> list[Verdict]:
    """Compare a uint8 picture (h, w, 3) with the scene that it should show."""
    height, width, _ = picture.shape
    short = min(height, width)
    background = PALETTE[scene.background]
    ink = np.linalg.norm(picture.astype(np.float64) - background, axis=-1) > 60
    rows, columns = np.mgrid[:height, :width] + 0.5
    distances = []  # to each object's edge, were it a disc where the prompt wants it
    for thing in scene.things:
        x, y = scenes.center_of(thing.place)
        distances.append(np.hypot(columns - x * width, rows - y * height) - SHARE_OF_SHORT[thing.size] * short)
    owner = np.argmin(distances, 0)
    return [judge_thing(picture, background, ink & (owner == k), t, atlas, short) for k, t in enumerate(scene.things)]


def judge_thing(
    picture: np.ndarray, background: np.ndarray, mask: np.ndarray, thing: scenes.Thing, atlas: torch.Tensor, short: int
) -> Verdict:
    height, width = mask.shape
    if mask.sum() < 12:
        return Verdict(False, False, False, False, 0.0)
    ink = np.median(picture[mask], 0)
    color = int(np.linalg.norm(PALETTE - ink, axis=1).argmin())
    mask = mask & (((picture - background) @ (ink - background)) > 0.5 * ((ink - background) ** 2).sum())
    rows, columns = np.nonzero(mask)
    # The middle of the bounding box, without the odd stray pixel.
    (top, bottom), (left, right) = np.percentile(rows, (0.5, 99.5)), np.percentile(columns, (0.5, 99.5))
    x, y = (left + right + 1) / 2, (top + bottom + 1) / 2
    place = int(np.argmin([np.hypot(cx * width - x, cy * height - y) for cx, cy in map(scenes.center_of, range(9))]))
    overlaps, radii = fit(mask, x, y, max(bottom - top, right - left) / 2, atlas)
    best = int(overlaps.argmax())
    size = int(np.abs(SHARE_OF_SHORT - radii[thing.shape] / short).argmin())
    asked = float(overlaps[thing.shape])
    return Verdict(
        color == thing.color, best == thing.shape and asked >= 0.7, place == thing.place, size == thing.size, asked
    )


def fit(mask: np.ndarray, x: float, y: float, reach: float, atlas: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Best overlap of each shape's drawn mask over small moves, turns and sizes, and the radius that gave it."""
    left, top = max(0, int(x - 1.4 * reach)), max(0, int(y - 1.4 * reach))
    want = torch.from_numpy(mask[top : int(y + 1.4 * reach) + 1, left : int(x + 1.4 * reach) + 1])
    base = torch.tensor((x - left, y - top, 0.0, 0.0), dtype=torch.float32)
    unit = torch.tensor((reach, reach, reach, 1.0), dtype=torch.float32)  # of the columns x, y, radius, angle
    coarse = _grid((0.0,), (-0.12, 0.0, 0.12), np.linspace(0.85, 1.3, 10), (0.0,))
    fine = _grid((-0.06, 0.0, 0.06), (-0.06, 0.0, 0.06), (-0.025, 0.0, 0.025), (-0.08, 0.0, 0.08))
    best, value = base.expand(8, 4), torch.zeros(8)
    for moves in (coarse, fine):
        tried = best[:, None] + moves * unit
        value, index = _overlaps(want, tried, atlas).max(1)
        best = tried[torch.arange(8), index]
    return value.numpy(), best[:, 2].numpy()


def _grid(*axes: Sequence[float] | np.ndarray) -> torch.Tensor:
    return torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float32) for axis in axes))


def _overlaps(want: torch.Tensor, tried: torch.Tensor, atlas: torch.Tensor) -> torch.Tensor:
    """Intersection over union of a mask with each shape at each (x, y, radius, angle): (8, n, 4) to (8, n)."""
    shape = torch.arange(8).repeat_interleave(tried.shape[1])
    x, y, radius, angle = tried.flatten(0, 1).unbind(1)
    height, width = want.shape
    drawn = scenes.draw_masks(atlas, shape, x, y, radius, angle, height, width) > 0.5
    overlap = (drawn & want).sum((1, 2)) / (drawn | want).sum((1, 2)).clamp(min=1)
    return overlap.view(8, -1)


def paint(
    pipeline: FluxPipeline, prompts: list[str], settings: dict[str, int], seed: int, batch: int
) -> list[np.ndarray]:
    generator = torch.Generator("cpu").manual_seed(seed)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        pictures += list(
            pipeline(prompts[start : start + batch], generator=generator, output_type="np", **settings).images
        )
    return [(p * 255).round().astype(np.uint8) for p in pictures]


def sheet(pictures: list[np.ndarray], columns: int = 8) -> Image.Image:
    """A contact sheet of equally sized pictures."""
    height, width, _ = pictures[0].shape
    page = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        page.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return page


def report(verdicts: list[list[Verdict]]) -> dict[str, float]:
    right = {
        name: [all(getattr(v, name) for v in vs) for vs in verdicts] for name in ("color", "shape", "place", "size")
    }
    scores = {name: round(100 * float(np.mean(values)), 1) for name, values in right.items()}
    scores["all"] = round(100 * float(np.mean(np.all(list(right.values()), 0))), 1)
    scores["overlap"] = round(100 * float(np.mean([v.overlap for vs in verdicts for v in vs])), 1)
    return scores


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--count", default=500, show_default=True)
@click.option("--steps", default=None, type=int, help="denoising steps [default: the model's own]")
@click.option("--size", default=128, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--batch", default=50, show_default=True)
@click.option("--sheet", "sheet_path", type=click.Path(path_type=Path), help="save the first 64 pictures here")
def main(
    model: Path, count: int, steps: int | None, size: int, device: str, seed: int, batch: int, sheet_path: Path | None
) -> None:
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((model / "triptych.json").read_text())["defaults"]
    settings = {**defaults, "height": size, "width": size}
    settings["num_inference_steps"] = steps or defaults["num_inference_steps"]
    cases = held_out_prompts(count, seed)
    start = time.monotonic()
    pictures = paint(pipeline, [text for text, _ in cases], settings, seed, batch)
    seconds = (time.monotonic() - start) / count
    atlas = scenes.shape_atlas()
    verdicts = [judge(picture, scene, atlas) for picture, (_, scene) in zip(pictures, cases, strict=True)]
    missed = Counter(scenes.SHAPES[t.shape] for vs, (_, s) in zip(verdicts, cases, strict=True)
                     for v, t in zip(vs, s.things, strict=True) if not v.shape)  # fmt: skip
    if sheet_path:
        sheet(pictures[:64]).save(sheet_path)
    print(json.dumps({"prompts": count, "size": size, "steps": settings["num_inference_steps"],
                      "percent_right": report(verdicts), "shapes_missed": dict(missed),
                      "seconds_a_picture": round(seconds, 3)}))  # fmt: skip


if __name__ == "__main__":
    main()

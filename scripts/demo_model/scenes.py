"""The world of the demo model: scenes of one or two flat shapes, their wordings and their drawing.

Knows nothing about models. A scene is drawn by code, so training data is endless and a picture can be
scored against the mask that it should show.

Longer than other files: what a scene is, says and looks like must agree.
"""

import functools
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
RADII = {"small": 0.09, "medium": 0.13, "large": 0.18}  # of the shorter side of the picture
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTERS = (0.2, 0.5, 0.8)  # of the picture's width or height

SIZE_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge"),
}
COLOR_WORDS = {name: (name,) for name in COLORS} | {"purple": ("purple", "purple", "violet")}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "donut"),
    "heart": ("heart",),
}
ANY_SHAPE = ("shape", "thing", "object")
PLACE_WORDS = {
    "top left": ("at the top left", "in the top left", "in the top left corner", "in the upper left", "top left"),
    "top": ("at the top", "at the top center", "at the top middle", "top", "in the upper middle"),
    "top right": ("at the top right", "in the top right", "in the top right corner", "in the upper right", "top right"),
    "left": ("on the left", "at the left", "on the left side", "to the left", "left"),
    "center": ("in the center", "in the middle", "at the center", "in the centre", "center"),
    "right": ("on the right", "at the right", "on the right side", "to the right", "right"),
    "bottom left": (
        "at the bottom left",
        "in the bottom left",
        "in the bottom left corner",
        "in the lower left",
        "bottom left",
    ),
    "bottom": ("at the bottom", "at the bottom center", "at the bottom middle", "bottom", "in the lower middle"),
    "bottom right": (
        "at the bottom right",
        "in the bottom right",
        "in the bottom right corner",
        "in the lower right",
        "bottom right",
    ),
}
OPENINGS = ("",) * 6 + ("a picture of ", "draw ", "an image of ", "show me ", "a drawing of ", "please draw ")
JOINS = (" and ", " and ", " and ", ", ", " with ", " next to ", " plus ")


@dataclass(frozen=True, slots=True)
class Thing:
    """An object; an index of -1 stands for an attribute that the prompt leaves open."""

    color: int
    shape: int
    size: int
    place: int


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    background: int


def held_out(color: int, shape: int, size: int, place: int) -> bool:
    """Return whether training never shows this: eight (color, shape) pairs, a tenth of (shape, size, place)."""
    return shape == (3 * color + 1) % 8 or (shape * 31 + size * 17 + place * 7) % 10 == 0


HELD_OUT = torch.tensor(
    [[[[held_out(c, s, z, p) for p in range(9)] for z in range(3)] for s in range(8)] for c in range(8)]
)


# -- wording ----------------------------------------------------------------------------------------


def phrase(thing: Thing, rng: random.Random, plain: bool) -> str:
    """The words of one object: 'a large red circle at the top left'."""
    first = (lambda words: words[0]) if plain else rng.choice
    shape = first(SHAPE_WORDS[SHAPES[thing.shape]]) if thing.shape >= 0 else rng.choice(ANY_SHAPE)
    color = first(COLOR_WORDS[list(COLORS)[thing.color]]) if thing.color >= 0 else ""
    size = first(SIZE_WORDS[list(RADII)[thing.size]]) if thing.size >= 0 else ""
    place = first(PLACE_WORDS[PLACES[thing.place]]) if thing.place >= 0 else ""
    noun = " ".join(word for word in (size, color, shape) if word)
    article = ("an " if noun[0] in "aeiou" else "a ") if plain or rng.random() < 0.8 else ""
    if place and not plain and rng.random() < 0.12:
        return f"{place} {article}{noun}"
    return f"{article}{noun} {place}".strip()


def compose(scene: Scene, rng: random.Random, plain: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """A prompt for the scene, and where in it each object's own words begin and end; see `wording`."""
    join = " and " if plain else rng.choice(JOINS)
    phrases = [phrase(thing, rng, plain) for thing in scene.things]
    body = join.join(phrases)
    opening = "" if plain else rng.choice(OPENINGS)
    if scene.background < 0:
        text = opening + body
    else:
        color = list(COLORS)[scene.background]
        a = "an" if color[0] in "aeiou" else "a"
        forms = [f"{body} on {a} {color} background"]
        if not plain:
            forms = forms * 4 + [
                f"{body} on {color}",
                f"{body} against {a} {color} background",
                f"{body}, {color} background",
                f"{body} with {a} {color} background",
                f"{a} {color} background with {body}",
                f"on {a} {color} background, {body}",
            ]
        text = opening + rng.choice(forms)
    if not plain and rng.random() < 0.15:
        text += "."
    spans, end = [], text.index(body)
    for words in phrases:
        start = text.index(words, end)
        end = start + len(words)
        spans.append((start, end))
    return text, spans


def wording(scene: Scene, rng: random.Random, plain: bool = False) -> str:
    """A prompt for the scene; `plain` gives the full standard form without synonyms."""
    return compose(scene, rng, plain)[0]


def vocabulary() -> list[str]:
    """Every word that a wording can contain, and a few more that people write."""
    tables = (SIZE_WORDS, COLOR_WORDS, SHAPE_WORDS, PLACE_WORDS)
    phrases = [form for table in tables for forms in table.values() for form in forms]
    phrases += [*ANY_SHAPE, *OPENINGS, *JOINS, "on against background the is of there one two an a in"]
    words = {word for text in phrases for word in text.replace("-", " - ").replace(",", " , ").split()}
    return sorted(words | {".", ",", "-", "!"})


def random_scene(rng: random.Random, full: bool = False) -> Scene:
    """A scene as a prompt may ask for it; with `full` nothing is left open. May be held out."""

    def pick(count: int, open_share: float) -> int:
        return -1 if not full and rng.random() < open_share else rng.randrange(count)

    background = pick(8, 0.25)
    things: list[Thing] = []
    for _ in range(rng.choice((1, 2, 2))):
        color = pick(8, 0.1)
        while color >= 0 and color == background:
            color = rng.randrange(8)
        place = pick(9, 0.15)
        while place >= 0 and things and place == things[0].place:
            place = rng.randrange(9)
        things.append(Thing(color, pick(8, 0.04), pick(3, 0.3), place))
    return Scene(tuple(things), background)


def overlaps(scene: Scene, margin: float = 0.02) -> bool:
    """Return whether two fully given objects would touch."""
    if len(scene.things) < 2:
        return False
    (ax, ay), (bx, by) = (center_of(thing.place) for thing in scene.things)
    reach = sum(list(RADII.values())[thing.size] for thing in scene.things)
    return float(np.hypot(ax - bx, ay - by)) < reach + margin


def center_of(place: int) -> tuple[float, float]:
    return CENTERS[place % 3], CENTERS[place // 3]


# -- drawing ----------------------------------------------------------------------------------------


def _polygon(shape: str) -> np.ndarray:
    """Corners (n, 2), y down, within the unit circle."""
    if shape == "circle":
        t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        return np.stack([np.cos(t), np.sin(t)], 1) * 0.95
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.8
    if shape == "triangle":
        return np.array([(0, -1), (0.95, 0.75), (-0.95, 0.75)])
    if shape == "diamond":
        return np.array([(0, -1), (0.66, 0), (0, 1), (-0.66, 0)])
    if shape == "star":
        t = -np.pi / 2 + np.arange(10) * np.pi / 5
        return np.stack([np.cos(t), np.sin(t)], 1) * np.where(np.arange(10) % 2, 0.42, 1.05)[:, None]
    if shape == "cross":
        a, b = 0.32, 0.95
        quarter = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return np.array(quarter + [(-x, -y) for x, y in quarter])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y - 2.5], 1) / 16
    raise ValueError(shape)


def _signed_distance(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance of each point (m, 2) to a polygon's edge, negative inside (even-odd rule)."""
    a, b = corners, np.roll(corners, -1, 0)
    edge = b - a
    along = np.clip(((points[:, None] - a) * edge).sum(-1) / (edge**2).sum(-1), 0, 1)
    distance = np.linalg.norm(points[:, None] - a - along[..., None] * edge, axis=-1).min(1)
    y = points[:, None, 1]
    crosses = (a[:, 1] <= y) != (b[:, 1] <= y)
    slope = edge[:, 0] / np.where(edge[:, 1] == 0, 1, edge[:, 1])
    inside = (crosses & (points[:, None, 0] < a[:, 0] + (y - a[:, 1]) * slope)).sum(1) % 2 == 1
    signed: np.ndarray = np.where(inside, -distance, distance)
    return signed


ATLAS_REACH = 1.5  # the atlas covers [-1.5, 1.5] of the unit shape


def shape_atlas(resolution: int = 192) -> torch.Tensor:
    """Signed distances of the shapes, float32 (8, resolution, resolution), in radii."""
    axis = (np.arange(resolution) + 0.5) / resolution * 2 * ATLAS_REACH - ATLAS_REACH
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    layers = []
    for shape in SHAPES:
        if shape == "ring":
            layer = np.abs(np.linalg.norm(points, axis=1) - 0.7) - 0.25
        else:
            layer = _signed_distance(_polygon(shape), points)
        layers.append(layer.reshape(resolution, resolution))
    return torch.tensor(np.stack(layers), dtype=torch.float32)


def draw_masks(
    atlas: torch.Tensor,
    shape: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    radius: torch.Tensor,
    angle: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """Anti-aliased coverage in [0, 1], (n, height, width); x, y, radius in pixels, angle in radians."""
    device = atlas.device
    rows = torch.arange(height, device=device).float() + 0.5
    columns = torch.arange(width, device=device).float() + 0.5
    dx = (columns[None, None, :] - x[:, None, None]) / radius[:, None, None]
    dy = (rows[None, :, None] - y[:, None, None]) / radius[:, None, None]
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    grid = torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1) / ATLAS_REACH
    distance = F.grid_sample(atlas[shape][:, None], grid, align_corners=False, padding_mode="border")[:, 0]
    outside = (grid.abs() > 1).any(-1)
    return torch.where(outside, 0.0, (0.5 - distance * radius[:, None, None]).clamp(0, 1))


@dataclass(slots=True)
class SceneBatch:
    """Scenes as tensors: attributes (n, 2, 4) as in Thing, background (n,), second (n,) whether two objects."""

    attributes: torch.Tensor
    background: torch.Tensor
    second: torch.Tensor

    @staticmethod
    def of(scenes: list[Scene]) -> "SceneBatch":
        rows = [[(t.color, t.shape, t.size, t.place) for t in (s.things[0], s.things[-1])] for s in scenes]
        return SceneBatch(
            torch.tensor(rows),
            torch.tensor([s.background for s in scenes]),
            torch.tensor([len(s.things) == 2 for s in scenes]),
        )


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Palette in [-1, 1], centers, radii and HELD_OUT on a device; copying them for each batch would stall it."""
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32) / 127.5 - 1
    tables = (palette, torch.tensor(CENTERS), torch.tensor(list(RADII.values())), HELD_OUT)
    palette, centers, radii, held = (table.to(device) for table in tables)
    return palette, centers, radii, held


def _distance(attributes: torch.Tensor) -> torch.Tensor:
    """Gap between the two objects, in shorter sides; negative where they overlap."""
    _, centers, radii, _ = _tables(attributes.device)
    place = attributes[..., 3]
    x, y = centers[place % 3], centers[place // 3]
    apart = torch.hypot(x[..., 0] - x[..., 1], y[..., 0] - y[..., 1])
    return apart - radii[attributes[..., 2]].sum(-1)


def fill_in(batch: SceneBatch, generator: torch.Generator, tries: int = 12) -> tuple[torch.Tensor, ...]:
    """Draw what the prompts leave open, never a held-out combination where one of `tries` allows it."""
    device = batch.attributes.device
    n = len(batch.background)

    def rand(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    drawn = torch.stack([rand(c, tries, n, 2) for c in (8, 8, 3, 9)], -1)
    given = batch.attributes[None].expand_as(drawn)
    attributes = torch.where(given >= 0, given, drawn)
    background = torch.where(batch.background >= 0, batch.background, rand(8, tries, n))
    c, s, z, p = attributes.unbind(-1)
    held = _tables(device)[3][c, s, z, p]
    clash = c == background[..., None]
    bad = 8 * (held | clash)[..., 0] + 8 * ((held | clash)[..., 1] & batch.second)
    bad = bad + (batch.second & (_distance(attributes) < 0.01))
    best = bad.argmin(0)
    index = torch.arange(n, device=device)
    return attributes[best, index], background[best, index], bad[best, index] >= 8


def draw(
    attributes: torch.Tensor,
    background: torch.Tensor,
    second: torch.Tensor,
    atlas: torch.Tensor,
    height: int,
    width: int,
    generator: torch.Generator,
    jitter: float = 1.0,
) -> torch.Tensor:
    """Pictures in [-1, 1], float32 (n, 3, height, width), with slightly varying place, size, angle and color."""
    device, n = atlas.device, len(background)
    palette, centers, radii, _ = _tables(device)
    short = min(height, width)

    def vary(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator, device=device) * 2 - 1) * jitter

    picture = (palette[background] + vary(n, 3) * 0.03)[:, :, None, None].expand(n, 3, height, width)
    for k in (0, 1):
        color, shape, size, place = attributes[:, k].unbind(-1)
        x = centers[place % 3] * width + vary(n) * 0.02 * short
        y = centers[place // 3] * height + vary(n) * 0.02 * short
        radius = radii[size] * short * (1 + vary(n) * 0.06)
        mask = draw_masks(atlas, shape, x, y, radius, vary(n) * 0.1, height, width)
        if k == 1:
            mask = mask * second[:, None, None]
        ink = (palette[color] + vary(n, 3) * 0.03)[:, :, None, None]
        picture = picture + (ink - picture) * mask[:, None]
    return picture.clamp(-1, 1)

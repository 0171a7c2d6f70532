"""Previews of a picture that is yet being denoised: its predicted end, through a small linear map to colors.

The map is fitted by the vae stage to jobs of this stack: their last latents, as the denoiser's loop has them, and their
pictures, averaged over the places of a latent. Until there is one, what differs most among latents is shown in gray.
"""

import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from protocol.job import Recipe
from protocol.messages.worker import PREVIEW_LATENTS
from protocol.tensors import Tensor
from workers.tensors import from_wire, to_wire

LEAST_SECONDS = 0.25  # between two previews of a job
MOST_CHANNELS = 32  # of latents; where there are more, those of 2 x 2 places are packed into one
ENOUGH = 8  # places for each number of the map
RIDGE = 1e-4  # of a feature's mean square, against what few pictures leave open
QUALITY = 80  # of a JPEG
POWER_STEPS = 16  # to a principal component
CONTRAST = 2.5  # standard deviations that are black or white
Emit = Callable[[int, bytes], None]  # after so many steps, a JPEG file


def grid_of(latents: Any, recipe: Recipe) -> torch.Tensor | None:
    """Return the first picture's latents, or those of a video's middle, as (channels, rows, columns), float32.

    None for an arrangement that isn't known.
    """
    if not isinstance(latents, torch.Tensor) or latents.numel() == 0:
        return None
    first = latents[0]
    if first.ndim == 4:  # of a video, (channels, frames, rows, columns)
        first = first[:, first.shape[1] // 2]
    if first.ndim == 2:  # places one after the other, with their channels
        places, channels = first.shape
        rows = round(math.sqrt(places * recipe.height / recipe.width))
        if rows == 0 or places % rows:
            return None
        first = first.T.reshape(channels, rows, places // rows)
    return unpacked(first.float()) if first.ndim == 3 else None


def unpacked(grid: torch.Tensor) -> torch.Tensor:
    """Return latents of 2 x 2 places apart that are packed into the channels of one, as FLUX and Qwen-Image do."""
    channels, rows, columns = grid.shape
    if channels <= MOST_CHANNELS or channels % 4:
        return grid
    apart = grid.reshape(channels // 4, 2, 2, rows, columns).permute(0, 3, 1, 4, 2)
    return apart.reshape(channels // 4, rows * 2, columns * 2)


def end_of(scheduler: Any, sigmas: Sequence[float], before: torch.Tensor, now: torch.Tensor, step: int) -> torch.Tensor:
    """Predict where denoising ends, from the latents before and after a step, counted from 0; at worst it is `now`.

    `sigmas` are the scheduler's, of all steps; none if it has none.
    Between two steps latents move along a line that leads to the end: x = x0 + σ·v for flows and what is scaled as
    they are, and x/α for those that keep the variance.
    """
    if step + 1 >= len(sigmas):
        return now
    first, second = sigmas[step], sigmas[step + 1]
    if not math.isfinite(first) or first == second:
        return now
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        scales = [float(scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma))[0]) for sigma in (first, second)]
        if min(scales) <= 0:
            return now
        spreads = [float(scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma))[1]) for sigma in (first, second)]
        before, now = before / scales[0], now / scales[1]
        first, second = spreads[0] / scales[0], spreads[1] / scales[1]
        if first == second:
            return now
    return now - second * (now - before) / (second - first)


def neighbours(grid: torch.Tensor) -> list[torch.Tensor]:
    """Return the latents around each place, (channels, places) for each of nine directions; the fifth is the place."""
    _, rows, columns = grid.shape
    padded = torch.nn.functional.pad(grid[None], (1, 1, 1, 1), mode="replicate")[0]
    return [padded[:, y : y + rows, x : x + columns].flatten(1) for y in range(3) for x in range(3)]


class ColorFit:
    """The map from latents to colors, as it is learned: sums over the places of all pictures that were seen."""

    def __init__(self) -> None:
        self.jobs = self._places = 0
        self._squares: torch.Tensor | None = None
        self._products: torch.Tensor | None = None

    def see(self, latents: Tensor, pictures: Tensor, video: bool = False) -> Tensor | None:
        """Learn of a job's latents and its first picture, or a video's middle; return the map.

        That is float32 (9 · channels + 1, 3): the colors by the latents around a place, and by nothing. Until enough
        was seen only the place's own count. None where they don't go together.
        """
        grid = from_wire(latents).float()
        if grid.ndim != 3 or not torch.isfinite(grid).all():
            return None
        channels, rows, columns = grid.shape
        count, height, width, _ = pictures.shape
        if height < rows or width < columns:
            return None
        picture = from_wire(pictures)[count // 2 if video else 0].permute(2, 0, 1)[None].float() / 255
        colors = torch.nn.functional.interpolate(picture, (rows, columns), mode="area")[0].flatten(1).T
        values = torch.cat([*neighbours(grid), grid.new_ones(1, rows * columns)]).T.double()
        squares, products = values.T @ values, values.T @ colors.double()
        if self._squares is None or self._squares.shape != squares.shape or self._products is None:
            self._squares, self._products, self.jobs, self._places = squares, products, 0, 0
        else:
            self._squares, self._products = self._squares + squares, self._products + products
        self.jobs += 1
        self._places += rows * columns
        used = torch.arange(len(squares))
        if self._places < ENOUGH * len(squares):
            used = torch.cat([used[4 * channels : 5 * channels], used[-1:]])
        system = self._squares[used][:, used]
        ridge = torch.diag(RIDGE * system.diagonal())
        ridge[-1, -1] = 0.0
        found = products.new_zeros(products.shape)
        found[used] = torch.linalg.solve(system + ridge, self._products[used])
        return to_wire("fit", found.float())


def drawn(grid: torch.Tensor, fit: torch.Tensor) -> torch.Tensor | None:
    """Return a preview's pixels, uint8 (height, width, 3); None where the map is of other latents."""
    channels, rows, columns = grid.shape
    if fit.shape != (9 * channels + 1, 3):
        return None
    colors = fit[-1][:, None].expand(3, rows * columns)
    for part, around in zip(fit[:-1].split(channels), neighbours(grid), strict=True):
        colors = colors + part.T @ around
    return (colors.T.reshape(rows, columns, 3).clamp(0, 1) * 255).round().to(torch.uint8)


def structure(grid: torch.Tensor, direction: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the principal component of latents as gray pixels, uint8 (height, width, 3), and its direction.

    That is sought from a `direction` on, which gives it its sign; no host waits for it.
    """
    channels, rows, columns = grid.shape
    values = grid.flatten(1) - grid.flatten(1).mean(1, keepdim=True)
    spread = values @ values.T
    if direction is None or direction.shape != (channels,):
        direction = grid.new_ones(channels)
    for _ in range(POWER_STEPS):
        direction = torch.nn.functional.normalize(spread @ direction, dim=0)
    line = direction @ values
    gray = (line / (CONTRAST * line.square().mean().sqrt().clamp_min(1e-6)) + 1) / 2
    return (gray.clamp(0, 1) * 255).round().to(torch.uint8).reshape(rows, columns, 1).expand(-1, -1, 3), direction


def jpeg(pixels: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


class Previews:
    """A task's previews. Nothing is computed until one is wanted; on a GPU its host never waits for one.

    `learns`: its last latents are to go to the vae stage, which fits the map to them.
    """

    def __init__(self, recipe: Recipe, emit: Emit, learns: bool) -> None:
        self._recipe, self._emit, self._learns = recipe, emit, learns
        self._wanted = False
        self._fit: torch.Tensor | None = None  # of the preview that is wanted; None: there is none yet
        self._before: torch.Tensor | None = None
        self._last: Any = None
        self._coming: tuple[int, torch.Tensor, Any] | None = None  # step, pixels on their way, and when they are here
        self._made = 0.0  # monotonic seconds
        self._direction: torch.Tensor | None = None  # of the last gray one
        self._asked: Any = None  # a scheduler's sigmas, and as numbers of the host's
        self._sigmas: Sequence[float] = ()

    def want(self, fit: Tensor | None) -> None:
        """Make one at the next step, from any thread."""
        self._fit = None if fit is None else from_wire(fit)
        self._wanted = True

    def see(self, pipeline: Any, step: int, latents: Any) -> None:
        """Look at the latents after a step, counted from 0."""
        if self._coming is not None and self._coming[2]():
            number, pixels, _ = self._coming
            self._coming = None
            self._emit(number, jpeg(pixels))
        if self._learns:
            self._last = latents
        if not self._wanted or self._coming is not None:
            self._before = None
            return
        grid, before = grid_of(latents, self._recipe), self._before
        self._before = grid
        now = time.monotonic()
        if grid is None or before is None or before.shape != grid.shape or now - self._made < LEAST_SECONDS:
            return
        fit, self._wanted, self._made = self._fit, False, now
        end = end_of(pipeline.scheduler, self._sigmas_of(pipeline.scheduler), before, grid, step)
        found = None if fit is None else drawn(end, on_device(fit, grid.device))
        if found is None:
            found, self._direction = structure(end, self._direction)
        self._coming = (step + 1, *to_host(found))

    def _sigmas_of(self, scheduler: Any) -> Sequence[float]:
        """Return a scheduler's sigmas, which may be on a GPU: its host waits for them once, not for each preview."""
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not self._asked:
            self._asked, self._sigmas = sigmas, [] if sigmas is None else torch.as_tensor(sigmas).tolist()
        return self._sigmas

    def left(self) -> list[Tensor]:
        """Return what the vae stage is to learn from."""
        grid = grid_of(self._last, self._recipe) if self._learns else None
        return [to_wire(PREVIEW_LATENTS, grid)] if grid is not None else []


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host's on a device, where it will be before what is launched next needs it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(pixels: torch.Tensor) -> tuple[torch.Tensor, Callable[[], bool]]:
    """Send pixels to the host; return where they will be, and what tells whether they are there."""
    if pixels.device.type != "cuda":
        return pixels.to("cpu"), lambda: True
    place = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    place.copy_(pixels, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return place, event.query

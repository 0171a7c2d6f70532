"""Previews: latents in any arrangement, the end that a scheduler's steps lead to, colors that are learned."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from protocol.job import Recipe
from protocol.tensors import Tensor
from workers.stages.preview import ColorFit, Previews, drawn, end_of, grid_of, structure, unpacked
from workers.tensors import from_wire, to_wire


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(
        prompt="a", negative_prompt=None, width=64, height=32, steps=8, guidance=None, cfg_scale=None, seed=1,
        num_images=1, max_sequence_length=None, model="m", revision="r", dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((1, 4, 4, 8), (4, 4, 8)),  # pictures
        ((2, 16, 5, 4, 8), (16, 4, 8)),  # a video
        ((1, 8, 64), (16, 4, 8)),  # FLUX's places of 2 x 2
        ((1, 32, 16), (16, 4, 8)),  # places that are not packed
        ((1, 7, 16), None),
        ((0, 4, 4, 8), None),
        ((3,), None),
    ],
)
def test_latents_in_any_arrangement(shape: tuple[int, ...], grid: tuple[int, ...] | None, recipe: Recipe) -> None:
    found = grid_of(torch.randn(shape), recipe)
    assert (None if found is None else tuple(found.shape)) == grid
    assert grid_of(None, recipe) is None


def test_packed_latents_come_apart_as_flux_packs_them() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(1, 16, 4, 8)
    packed = FluxPipeline._pack_latents(latents, 1, 16, 4, 8)
    assert torch.equal(unpacked(packed[0].T.reshape(64, 2, 4)), latents[0])


@pytest.mark.parametrize(
    "scheduler",
    [FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler(), DPMSolverMultistepScheduler(solver_order=1)],
)
def test_the_end_is_foreseen_exactly_where_the_model_always_says_the_same(scheduler: Any) -> None:
    """A denoiser that knows the end gives it at each step: after any of them it must be told."""
    scheduler.set_timesteps(8)
    end, latents = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4) * float(getattr(scheduler, "init_noise_sigma", 1))
    for step, timestep in enumerate(scheduler.timesteps[:-1]):
        sigma = float(scheduler.sigmas[step])
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | EulerDiscreteScheduler):
            said = (latents - end) / sigma
        else:
            alpha, spread = scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma))
            said = (latents - alpha * end) / spread
        after = scheduler.step(said, timestep, latents, return_dict=False)[0]
        assert torch.allclose(end_of(scheduler, scheduler.sigmas.tolist(), latents, after, step), end, atol=1e-3)
        latents = after


def test_a_scheduler_that_is_not_known_shows_what_there_is() -> None:
    before, now = torch.zeros(4, 2, 2), torch.ones(4, 2, 2)
    assert torch.equal(end_of(object(), [], before, now, 0), now)
    unipc = UniPCMultistepScheduler()
    unipc.set_timesteps(4)
    assert torch.isfinite(end_of(unipc, unipc.sigmas.tolist(), before, now, 3)).all()  # the last step's sigma may be 0


def pictures_of(grid: torch.Tensor, map_: torch.Tensor) -> Tensor:
    """A picture of which each place's 8 x 8 pixels have a color that is linear in its latents."""
    colors = torch.einsum("chw,cr->hwr", grid, map_).clamp(0, 1).numpy()
    pixels = np.repeat(np.repeat((colors * 255).round().astype("uint8"), 8, 0), 8, 1)[None]
    return Tensor("pictures", "uint8", pixels.shape, pixels.tobytes())


def test_colors_are_learned_of_pictures() -> None:
    map_ = torch.rand(4, 3) / 4
    fit, learned = ColorFit(), None
    for seed in range(8):
        grid = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(seed))
        learned = fit.see(to_wire("l", grid), pictures_of(grid, map_))
    assert learned is not None
    assert fit.jobs == 8
    grid = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(99))
    found = drawn(grid, from_wire(learned))
    assert found is not None
    wanted = torch.einsum("chw,cr->hwr", grid, map_) * 255
    assert (found.float() - wanted).abs().max() < 4
    assert drawn(torch.rand(16, 4, 4), from_wire(learned)) is None  # another model's latents


def test_what_does_not_go_together_teaches_nothing() -> None:
    fit = ColorFit()
    small = Tensor("pictures", "uint8", (1, 2, 2, 3), bytes(12))
    assert fit.see(to_wire("l", torch.rand(4, 16, 16)), small) is None
    assert fit.see(to_wire("l", torch.full((4, 2, 2), torch.nan)), small) is None
    assert fit.jobs == 0


def test_nothing_is_made_until_somebody_looks_and_then_once(recipe: Recipe) -> None:
    made: list[tuple[int, bytes]] = []
    previews = Previews(recipe, lambda step, file: made.append((step, file)), learns=True)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    pipeline = type("Pipeline", (), {"scheduler": scheduler})()
    latents = torch.rand(1, 4, 4, 8)
    for step in range(3):
        previews.see(pipeline, step, latents)
    assert made == []
    previews.want(to_wire("fit", torch.rand(37, 3)))
    for step in range(3, 7):
        previews.see(pipeline, step, latents * (8 - step))
    ((step, file),) = made
    assert step == 5  # two steps show where a line leads
    assert Image.open(io.BytesIO(file)).size == (8, 4)
    (left,) = previews.left()
    assert left.shape == (4, 4, 8)
    assert Previews(recipe, lambda step, file: None, learns=False).left() == []


def test_without_a_map_what_differs_most_is_shown_in_gray_and_keeps_its_sign() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = torch.zeros(8, 8)
    shape[2:6, 2:6] = 1.0
    latents = torch.randn(16, 8, 8, generator=generator) * 0.1 + 7
    latents += torch.rand(16, 1, 1, generator=generator) * shape
    pixels, direction = structure(latents)
    assert pixels.shape == (8, 8, 3)
    assert torch.equal(pixels[..., 0], pixels[..., 2])
    assert pixels[2:6, 2:6].float().mean() > 100 + pixels[shape == 0].float().mean()
    assert torch.equal(structure(latents, -direction)[0].float() + pixels.float(), torch.full((8, 8, 3), 255.0))
    assert torch.equal(structure(torch.full((4, 2, 2), 3.0))[0], torch.full((2, 2, 3), 128, dtype=torch.uint8))

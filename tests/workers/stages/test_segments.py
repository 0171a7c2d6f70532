"""Pipelines that denoise on with what they have decoded: each decode is recorded, and denoising goes on from there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from protocol.client.input_pictures import picture_of, video_of
from protocol.job import JobRequest, Recipe
from protocol.pictures import pictures_among
from protocol.recipe import resolve
from protocol.stages import STAGES, Stage
from protocol.tensors import Tensor
from tests import tiny, tiny_videos
from tests.families.case import awake
from tests.pictures import noise
from tests.records import decodes_of
from tests.stages import CPU, go_through, stages, through
from tests.tiny_videos import frames_of
from workers.models.description import describe
from workers.models.source import Source, read
from workers.stages.checkpoint import read as read_checkpoint
from workers.stages.contract import Saved, unheard
from workers.stages.pipeline_call import frames_of as images_of

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_videos.wan_animate()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            awake(component)
    return tiny.save(pipeline, tmp_path_factory.mktemp("models") / "animate")


def clip(seed: int, frames: int = 21) -> Tensor:
    return video_of([noise((16, 16), seed * 100 + number) for number in range(frames)])


GIVEN = {"image:0": picture_of(noise((16, 16), 1)), "video:pose_video": clip(2), "video:face_video": clip(3)}


def job(folder: Path) -> tuple[Source, Recipe, tuple[Tensor, ...]]:
    """Make a job of three segments: 21 frames, 9 in a segment, of which one is the last of the segment before."""
    source = read(str(folder), folder, None)
    request = JobRequest(
        prompt="a red circle", steps=STEPS, seed=5, width=16, height=16, images=(GIVEN["image:0"].name,),
        videos=tuple((name.removeprefix("video:"), one.name) for name, one in GIVEN.items() if name[0] == "v"),
        settings=(("segment_frame_length", "9"),),
    )  # fmt: skip
    recipe = resolve(request, describe(source), "float32", None, picture_size=(16, 16), video_frames=21)
    return source, recipe, tuple(replace(one, name=name) for name, one in GIVEN.items())


def plainly(folder: Path) -> torch.Tensor:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return frames_of(
        pipeline(
            prompt="a red circle", image=noise((16, 16), 1), pose_video=images_of(GIVEN["video:pose_video"]),
            face_video=images_of(GIVEN["video:face_video"]), width=16, height=16, segment_frame_length=9,
            num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(5),
        )
    )  # fmt: skip


def test_a_segment_begins_with_what_was_decoded_of_the_one_before(folder: Path) -> None:
    source, recipe, given = job(folder)
    made, way = go_through(source, recipe, given, checkpoint_seconds=0.0)
    assert way[-6:] == ["denoise", "vae"] * 3
    pictures = pictures_among(made)
    assert bytes(pictures.data) == plainly(folder).numpy().tobytes()


LATER = [pytest.param(step, marks=pytest.mark.all) for step in (1, STEPS, 2 * STEPS + 1)]


@pytest.mark.parametrize("step", [STEPS + 2, *LATER])
def test_a_denoiser_that_dies_in_a_segment_is_followed_by_one_with_the_same_bits(folder: Path, step: int) -> None:
    source, recipe, given = job(folder)
    made = through(source, recipe, given, killed_at=step)
    assert torch.equal(made, plainly(folder))


@pytest.mark.all
def test_without_checkpoints_the_segments_before_are_denoised_again(folder: Path) -> None:
    source, recipe, given = job(folder)
    made = through(source, recipe, given)
    assert torch.equal(made, plainly(folder))


def test_each_checkpoint_holds_the_ends_of_all_loops_that_are_over(folder: Path) -> None:
    """So that a visit before, done again where its result was lost, may go on from it, too."""
    source, recipe, given = job(folder)
    saved: list[Saved] = []

    def keep(step: int, steps: int, checkpoint: Saved | None = None) -> None:
        saved.extend([checkpoint] if checkpoint else [])

    by_name: dict[Stage, Any] = dict(zip(STAGES, stages(source), strict=True))
    by_name["denoise"].checkpoint_seconds = 0.0
    outcome = by_name["text"].run(recipe, given, unheard)
    before: tuple[Tensor, ...] = ()
    while outcome.next:
        task = (*outcome.tensors, *given)
        before = task if outcome.next == "denoise" and not before else before
        outcome = by_name[outcome.next].run(recipe, task, keep if outcome.next == "denoise" else unheard)
    marks = [[mark.step for mark in read_checkpoint(one.tensors, CPU).marks] for one in saved]
    assert marks[-1] == [STEPS, 2 * STEPS, 3 * STEPS - 1]
    again = by_name["denoise"].run(
        recipe, (*before, *saved[-1].tensors), unheard
    )  # the first visit, with the last of them
    first = by_name["denoise"].run(recipe, before, unheard)
    assert decodes_of(again.tensors) == decodes_of(first.tensors)


def test_the_segments_before_are_not_denoised_again(folder: Path) -> None:
    source, recipe, given = job(folder)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    by_name: dict[Stage, Any] = dict(zip(STAGES, stages(source), strict=True))
    by_name["denoise"].checkpoint_seconds = 0.0
    by_name["denoise"].pipeline.transformer.patch_embedding.register_forward_hook(count)
    outcome = by_name["text"].run(recipe, given, unheard)
    while outcome.next:
        outcome = by_name[outcome.next].run(recipe, (*outcome.tensors, *given), unheard)
    assert forwards == 3 * STEPS

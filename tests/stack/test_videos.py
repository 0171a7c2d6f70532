"""Videos through a whole stack: the frames of the plain pipelines, in parts, and files that say how to repeat them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanVideoToVideoPipeline
from PIL import Image

from protocol.pictures import PART_BYTES
from tests import tiny, tiny_videos
from tests.pictures import noise
from tests.stacks import RunningStack, running_stack, triptych

PROMPT = "a red circle"
SIZE = {"width": 256, "height": 256}
FRAMES = 25
SMALL = ("--size", "32x32", "--frames", "9", "--steps", "2", "--seed", "3")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny_videos.wan(experts=2), tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def videos(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("videos") / "state", "--model", str(wan)) as stack:
        stack.picture(PROMPT, frames=9, steps=1, width=32, height=32)  # so that the model is known, and nothing waits
        yield stack


def test_a_video_of_several_parts_has_the_frames_of_the_plain_pipeline(videos: RunningStack, wan: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(wan)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    plain = pipeline(PROMPT, num_frames=FRAMES, num_inference_steps=2, generator=generator, **SIZE)
    job, frames = videos.picture(PROMPT, frames=FRAMES, steps=2, seed=5, **SIZE)
    assert frames.numel() > PART_BYTES
    assert torch.equal(frames, tiny_videos.frames_of(plain))
    assert (job.pictures, job.recipe.frames, job.recipe.fps) == (1, FRAMES, 16.0)


@pytest.mark.all
def test_files_of_a_video_tell_how_to_make_it_again(videos: RunningStack, tmp_path: Path) -> None:
    def run(*arguments: str) -> list[str]:
        done = triptych(*arguments, folder=videos.folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("submit", PROMPT, *SMALL, "--fps", "8", "-o", "clip.mp4") == ["clip.mp4"]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, float(stream.average_rate or 0), stream.width) == (9, 8.0, 32)
    assert run("retry", "clip.mp4", "-o", "one-%02d.png") == ["one-%02d.png"]
    run("retry", "clip.mp4", "-o", "clip.webm")
    run("retry", "clip.webm", "-o", "clip.gif")
    run("retry", "clip.gif", "-o", "two-%02d.png")
    ones, twos = (sorted(tmp_path.glob(f"{name}-*.png")) for name in ("one", "two"))
    assert len(ones) == len(twos) == 9
    for one, two in zip(ones, twos, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))


def test_a_video_is_made_of_a_video(videos: RunningStack, wan: Path, tmp_path: Path) -> None:
    clip = [noise((32, 32), number) for number in range(9)]
    pipeline = WanVideoToVideoPipeline.from_pretrained(wan)
    pipeline.set_progress_bar_config(disable=True)
    plain = pipeline(
        clip, PROMPT, num_inference_steps=4, strength=0.5, width=32, height=32,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    options = {"steps": 4, "strength": 0.5, "seed": 5, "width": 32, "height": 32}
    job, frames = videos.picture(PROMPT, video=clip, **options)
    assert torch.equal(frames, tiny_videos.frames_of(plain))
    assert job.recipe.frames == 9

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return triptych(*arguments, folder=videos.folder, cwd=tmp_path)

    settings = ("--strength", "0.5", "--size", "32x32", "--steps", "4", "--seed", "3")
    assert run("submit", PROMPT, *SMALL, "-o", "in.mp4").returncode == 0
    made = run("submit", PROMPT, "--video", "in.mp4", *settings, "-o", "one-%02d.png")
    assert made.returncode == 0, made.stderr
    again = run("retry", "one-01.png", "--video", "in.mp4", "-o", "two-%02d.png")
    assert again.returncode == 0, again.stderr
    ones, twos = (sorted(tmp_path.glob(f"{name}-*.png")) for name in ("one", "two"))
    assert len(ones) == 9
    assert all(np.array_equal(Image.open(one), Image.open(two)) for one, two in zip(ones, twos, strict=True))
    noise((32, 32)).save(tmp_path / "in.png")
    (tmp_path / "text.mp4").write_text("hello")
    for options_given, words in (
        (["--video", "nowhere.mp4"], "There is no file 'nowhere.mp4'"),
        (["--video", "text.mp4"], "can't be read as a video"),
        (["--video", "pose_video=in.mp4"], "takes no 'pose_video'"),
        (["--video", "in.mp4", "--video", "in.mp4"], "given twice"),
        (["--video", "in.mp4", "--frames", "5"], "as many frames as the video has"),
    ):
        refused = run("submit", PROMPT, *options_given)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert words in refused.stderr, refused.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--frames", "10"], "The nearest are 9."),
        (["--frames", "0"], "It must be positive"),
        (["--frames", "1000"], "At most 324 fit"),
        (["--fps", "0"], "It goes from 1 to 240"),
        (["-o", "x.png"], "Name it x.mp4"),
        (["--image", "in.png"], "takes no pictures"),
    ],
)
def test_what_no_video_can_be_is_refused_in_one_line(
    videos: RunningStack, tmp_path: Path, options: list[str], words: str
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    done = triptych("submit", PROMPT, "--size", "32x32", *options, folder=videos.folder, cwd=tmp_path)
    assert (done.returncode > 1, done.stderr.count("\n"), words in done.stderr) == (True, 1, True), done.stderr

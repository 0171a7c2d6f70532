"""Jobs that begin from a picture, through a whole stack: with the bits of the plain pipelines, by content."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protocol.errors import BadRequest
from protocol.job import JobRequest
from tests.pictures import half, noise, plain_of_picture
from tests.stacks import RunningStack, running_stack, triptych
from workers.models.source import DEMO_FOLDER

PROMPT = "a large red circle at the top left"
DEFAULTS = {"width": 128, "height": 128, "num_inference_steps": 10, "max_sequence_length": 48}  # of the demo model
SIZE = (128, 128)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    with running_stack(tmp_path_factory.mktemp("demo") / "state") as stack:
        yield stack


def test_a_picture_and_a_mask_give_the_bits_of_the_plain_pipelines(demo: RunningStack) -> None:
    image, mask = noise(SIZE), half(SIZE)
    for ours, theirs in (({}, (image,)), ({"mask": mask}, (image, mask))):
        wanted = plain_of_picture(DEMO_FOLDER, *theirs, prompt=PROMPT, strength=0.5, seed=3, **DEFAULTS)
        job, first = demo.picture(PROMPT, images=image, strength=0.5, seed=3, **ours)
        assert torch.equal(first, wanted)
        again, second = demo.picture(PROMPT, images=[image], strength=0.5, seed=3, **ours)
        assert torch.equal(second, wanted)
        assert again.cached
        assert job.recipe == again.recipe


def test_a_sweep_over_one_prompt_encodes_it_once(demo: RunningStack) -> None:
    options = {"negative_prompt": "blurry"}
    first, _ = demo.picture("a sweep", cfg_scale=2.0, seed=1, steps=2, **options)
    assert [(record.stage, record.cached, record.wants) for record in first.records] == [
        ("text", False, "transformer.forward"), ("denoise", False, "vae.decode"), ("vae", False, "")
    ]  # fmt: skip
    sweep = ({"cfg_scale": 3.0}, {"cfg_scale": 2.0, "steps": 3}, {"cfg_scale": 4.0, "width": 64, "seed": 2})
    assert all(demo.picture("a sweep", **options, **one)[0].cached for one in sweep)
    assert not demo.picture("a sweep", **options, cfg_scale=1.0)[0].cached  # for which nothing negative is encoded


def test_several_jobs_of_a_submission_share_a_picture_that_is_sent_once(demo: RunningStack) -> None:
    from protocol.client.input_pictures import picture_of

    picture = picture_of(noise(SIZE, 5))
    requests = [JobRequest(prompt=PROMPT, images=(picture.name,), seed=seed, steps=2) for seed in (1, 2)]
    jobs = demo.client.submit_many(requests, pictures=[picture])
    one, two = (demo.pictures(demo.client.wait(job.id).id) for job in jobs)
    assert not torch.equal(one, two)
    later = demo.client.submit_many([requests[0].model_copy(update={"id": None})])  # the stack has it still
    assert torch.equal(demo.pictures(demo.client.wait(later[0].id).id), one)
    unknown = JobRequest(prompt=PROMPT, images=("0" * 64,))
    with pytest.raises(BadRequest, match="did not come with it"):
        demo.client.submit_many([unknown])
    swapped = JobRequest(prompt=PROMPT, images=(picture.name,), mask=picture.name)
    with pytest.raises(BadRequest, match="masks have one"):
        demo.client.submit_many([swapped], pictures=[picture])


def test_a_picture_of_a_camera_is_not_too_large(demo: RunningStack) -> None:
    job, pictures = demo.picture(PROMPT, images=noise((2500, 2500)), strength=0.5, steps=2, seed=1)
    assert (job.state, pictures.shape) == ("done", (1, 128, 128, 3))


def test_a_png_made_of_a_picture_is_made_again_from_the_very_same_one(demo: RunningStack, tmp_path: Path) -> None:
    noise(SIZE).save(tmp_path / "in.png")
    noise(SIZE, 1).save(tmp_path / "other.png")
    done = triptych("submit", PROMPT, "--image", "in.png", "--strength", "0.6", "-o", "out.png", folder=demo.folder,
                    cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = triptych("retry", "out.png", "--image", "in.png", "-o", "again.png", folder=demo.folder, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out.png").read_bytes()[-2000:] == (tmp_path / "again.png").read_bytes()[-2000:]
    without = triptych("retry", "out.png", "-o", "again.png", folder=demo.folder, cwd=tmp_path)
    assert (without.returncode, "was made of 1 pictures; none were given" in without.stderr) == (2, True)
    other = triptych("retry", "out.png", "--image", "other.png", folder=demo.folder, cwd=tmp_path)
    assert (other.returncode, "was made of another picture" in other.stderr) == (2, True)


BAD = {
    "a mask alone": (["--mask", "in.png"], "a mask without a picture"),
    "strength alone": (["--strength", "0.5"], "no meaning without a picture"),
    "no file": (["--image", "nowhere.png"], "There is no file 'nowhere.png'"),
    "a text": (["--image", "text.png"], "can't be read as a picture"),
    "an animation": (["--image", "moving.webp"], "2 frames"),
    "too many": (["--image", "in.png", "--image", "in.png"], "takes one picture"),
    "too strong": (["--image", "in.png", "--strength", "1.5"], "It goes from 0 to 1"),
    "a bomb": (["--image", "bomb.png"], "too many pixels"),
}


def test_bad_pictures_are_one_line_and_nothing_is_queued(demo: RunningStack, tmp_path: Path) -> None:
    noise(SIZE).save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("hello")
    noise().save(tmp_path / "moving.webp", save_all=True, append_images=[noise(seed=1)])
    (tmp_path / "bomb.png").write_bytes(bomb(60_000, 60_000))
    before = demo.client.jobs()
    for name, (options, words) in BAD.items():
        done = triptych("submit", PROMPT, *options, folder=demo.folder, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (name, done.stderr)
        assert words in done.stderr, (name, done.stderr)
    assert demo.client.jobs() == before


def bomb(width: int, height: int) -> bytes:
    """A PNG's header that promises so many pixels."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

"""A stage on its own: three commands in a row give the whole stack's picture."""

import json
from pathlib import Path

import av
import pytest
from PIL import Image

from tests import tiny, tiny_videos
from tests.pictures import noise
from tests.stacks import RunningStack, running_stack, triptych


def test_three_stages_by_hand_equal_the_stack(stack: RunningStack, flux_dev: Path, tmp_path: Path) -> None:
    model = ("--standalone", "--model", str(flux_dev), "--device", "cpu")
    text = triptych("worker", "text", *model, "--prompt", "a red star", "-o", "e.safetensors", cwd=tmp_path)
    assert text.returncode == 0, text.stderr
    assert "float32 [1, 512, 32]" in text.stderr
    assert "next: triptych worker denoise --standalone -i e.safetensors" in text.stderr
    size = ("--width", "32", "--height", "32", "--steps", "3", "--seed", "1")
    denoise = triptych(
        "worker", "denoise", "--standalone", "-i", "e.safetensors", *size, "-o", "l.safetensors", "--device", "cpu",
        "--repeat", "2", "--profile", "trace.json", cwd=tmp_path,
    )  # fmt: skip
    assert denoise.returncode == 0, denoise.stderr
    assert "denoise (2 of 2)" in denoise.stderr
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    vae = triptych("worker", "vae", *model, "-i", "l.safetensors", "-o", "out.png", cwd=tmp_path)
    assert vae.stdout == "out.png\n"
    _, whole = stack.picture("a red star", width=32, height=32, steps=3, seed=1)
    with Image.open(tmp_path / "out.png") as image:
        assert image.tobytes() == bytes(whole.numpy().tobytes())


@pytest.mark.all
def test_four_stages_by_hand_change_a_picture_and_make_a_video(tmp_path: Path) -> None:
    """A picture goes to the VAE before the denoiser, and travels in the stages' files."""
    folder = tiny.save(tiny_videos.wan_of_image(), tmp_path / "wan")
    noise().save(tmp_path / "in.png")
    asked = ("--prompt", "a red star", "--image", "in.png", "--frames", "5", "--width", "32", "--height", "32",
             "--steps", "2", "--seed", "1")  # fmt: skip
    given: tuple[str, ...] = ("--model", str(folder), *asked)
    for stage, name in (("text", "a"), ("vae", "b"), ("denoise", "c")):
        done = triptych("worker", stage, "--standalone", *given, "--device", "cpu", "-o", f"{name}.safetensors",
                        cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        given = ("-i", f"{name}.safetensors")
    done = triptych("worker", "vae", "--standalone", *given, "--device", "cpu", "-o", "out.mp4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wrong = triptych("worker", "vae", "--standalone", *given, "--device", "cpu", "-o", "out.tiff", cwd=tmp_path)
    assert (wrong.returncode, "Name it FILE.mp4" in wrong.stderr, "Traceback" in wrong.stderr) == (2, True, False)
    with running_stack(tmp_path / "state", "--model", str(folder), "--device", "cpu") as stack:
        again = triptych("retry", "out.mp4", "--image", "in.png", "--anyway", "-o", "again.mp4", folder=stack.folder,
                         cwd=tmp_path)  # fmt: skip
        assert again.returncode == 0, again.stderr
    assert decoded(tmp_path / "out.mp4") == decoded(tmp_path / "again.mp4")


def decoded(path: Path) -> list[bytes]:
    """The frames of a file; an encoder makes the same of the same frames."""
    with av.open(str(path)) as container:
        return [frame.to_image().tobytes() for frame in container.decode(video=0)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("text", "--standalone"), 2, "needs a prompt"),
        (("denoise", "--standalone"), 2, "-i FILE.safetensors"),
        (("vae", "--standalone", "-i", "missing.safetensors"), 2, "no file"),
        (("vae", "--standalone", "-i", "text.txt"), 2, "can't be read"),
        (("text", "--standalone", "--prompt", "x", "--model", "nowhere"), 4, "no model 'nowhere'"),
        (("text", "--standalone", "--prompt", "x", "--dtype", "float8"), 2, "no dtype"),
        (("text", "--gpus", "first"), 2, "numbers"),
        (("denoise", "--standalone", "-i", "e.safetensors", "--jobs", "2"), 2, "one job in one process"),
        (("denoise", "--standalone", "-i", "e.safetensors", "--cut", "a,b"), 2, "whole numbers"),
        (("text", "--connect", "tcp://10.0.0.1:5"), 2, "not on this machine"),
    ],
)
def test_mistakes_get_one_line(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("not safetensors")
    (tmp_path / "e.safetensors").write_text("not safetensors")
    done = triptych("worker", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr

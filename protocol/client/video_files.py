"""Videos of a stack's frames in files: H.264 in mp4, VP9 in webm, gif, by PyAV and Pillow; with their whole recipe."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from protocol.client.picture_files import WRITTEN, Metadata, save_picture, writing
from protocol.errors import BadRequest
from protocol.job import Recipe
from protocol.pictures import SOUND, SOUND_RATE
from protocol.tensors import Tensor

CODECS: Mapping[str, tuple[str, dict[str, str], str]] = {  # by suffix: of the picture, its settings, of the sound
    ".mp4": ("libx264", {"crf": "16", "preset": "medium"}, "aac"),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1", "cpu-used": "4"}, "libopus"),
}
CONTAINERS = tuple(CODECS)
SUFFIXES = (*CONTAINERS, ".gif")
SEQUENCE = re.compile(r"%0?\d*d")  # in a name: of the number of a video's frame
COMMENT = "comment"  # the tag that holds the making


@dataclass(frozen=True, slots=True)
class Sound:
    """The sound of a video: float32 samples (channels, samples) from -1 to 1, and their number a second."""

    samples: Tensor
    rate: int


def sound_of(tensors: Sequence[Tensor], index: int) -> Sound | None:
    """Return the sound of a job's video, counted from 0; None where it has none."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if SOUND not in by_name or SOUND_RATE not in by_name:
        return None
    sound = by_name[SOUND]
    _, channels, samples = sound.shape
    size = channels * samples * 4
    data = memoryview(sound.data).cast("B")[index * size : (index + 1) * size]
    rate = int.from_bytes(by_name[SOUND_RATE].data, "little")
    return Sound(Tensor(SOUND, "float32", (channels, samples), data), rate)


def save_made(
    images: Sequence[Image.Image], index: int, path: Path, recipe: Recipe, metadata: Metadata | None,
    sound: Sound | None = None,
) -> None:  # fmt: skip
    """Write one of a job's pictures or videos, counted from 0, of all its pictures or frames; BadRequest.

    A video goes to a file, or by a name such as FILE-%04d.png to one for each frame.
    """
    each = len(images) // recipe.num_images
    frames = images[index * each : (index + 1) * each]
    suffix = path.suffix.lower()
    if recipe.frames is not None and suffix in SUFFIXES:
        save_video(frames, path, recipe.fps or 1, metadata, sound)
    elif suffix not in WRITTEN or (recipe.frames is not None and not SEQUENCE.search(path.name)):
        fits = (*SUFFIXES, "-%04d.png") if recipe.frames is not None else tuple(WRITTEN)
        raise BadRequest(f"{str(path)!r} is no name for what is made.", f"Name it FILE{', FILE'.join(fits)}.")
    elif recipe.frames is None:
        save_picture(images[index], path, metadata)
    else:
        for number, frame in enumerate(frames, 1):
            save_picture(frame, path.with_name(numbered(path.name, number)), metadata)


def numbered(name: str, number: int) -> str:
    """Fill the place for a frame's number in the name of a sequence's file."""
    return SEQUENCE.sub(lambda found: found[0] % number, name, count=1)


def save_video(
    frames: Sequence[Image.Image], path: Path, fps: float, metadata: Metadata | None, sound: Sound | None = None
) -> None:
    """Write a video in the format of its suffix, one of SUFFIXES; BadRequest. A gif has no sound."""
    if path.suffix.lower() == ".gif":
        comment = {"comment": metadata.making.encode()} if metadata else {}
        milliseconds = max(20, round(1000 / fps))  # less is shown as a tenth of a second by browsers
        first, *others = frames
        writing(
            path,
            lambda draft: first.save(
                draft, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, **comment
            ),
        )
        return
    writing(path, lambda draft: encode(frames, draft, path.suffix.lower(), fps, metadata, sound))


def encode(
    frames: Sequence[Image.Image], draft: Path, suffix: str, fps: float, metadata: Metadata | None, sound: Sound | None
) -> None:
    import av

    codec, settings, sound_codec = CODECS[suffix]
    options = {"movflags": "use_metadata_tags+faststart"} if suffix == ".mp4" else {}
    with av.open(os.fspath(draft), "w", format=suffix[1:], options=options) as container:
        if metadata:
            container.metadata[COMMENT] = metadata.making
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=settings)
        stream.width, stream.height = frames[0].size
        odd = frames[0].width % 2 or frames[0].height % 2
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"  # what every player shows, where it can
        track: Any = None
        if sound:
            track = container.add_stream(sound_codec, rate=sound.rate)
            track.layout = "stereo" if sound.samples.shape[0] == 2 else "mono"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
        if sound:
            mux_sound(container, track, sound)


def mux_sound(container: Any, track: Any, sound: Sound) -> None:
    import av
    import numpy as np

    samples = np.frombuffer(sound.samples.data, np.float32).reshape(sound.samples.shape).clip(-1, 1)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", track.layout.name)
    frame.sample_rate = sound.rate
    resampler = av.AudioResampler(track.format.name, track.layout.name, track.rate)
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        container.mux(track.encode(piece))
    container.mux(track.encode())


def making_of(path: Path) -> str:
    """Return the making that a video file carries; empty if it carries none. BadRequest."""
    import av

    try:
        with av.open(os.fspath(path)) as container:
            found = {name.lower(): value for name, value in container.metadata.items()}
    except (OSError, ValueError) as error:  # of which PyAV's own errors are kinds
        raise BadRequest(f"{str(path)!r} can't be read as a video.") from error
    comment = found.get(COMMENT, "")
    return comment if comment.startswith("{") else ""

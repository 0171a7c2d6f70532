"""The description of a model: found by the describer, used by the orchestrator to judge requests."""

from protocol.data import Data, Positive
from protocol.settings import Setting
from protocol.stages import Stage


class PipelineTask(Data):
    """The inputs of a pipeline over the model's weights, for jobs with pictures; defaults as in ModelDescription."""

    pipeline: str  # class name in diffusers
    several: bool = False  # pictures
    steps: Positive
    guidance: float | None
    cfg_scale: float | None
    strength: float | None = None  # default; None where it takes none
    control: bool = False  # a picture that a ControlNet keeps to
    settings: tuple[Setting, ...] = ()  # further arguments
    videos: tuple[str, ...] = ()  # names of the videos that it takes
    frames: bool = False  # it takes a number of frames; else it makes as many as the video given has
    ip_image: bool = False  # it takes a picture for an IP-Adapter
    sized: bool = True  # it takes a width and a height; else the result has the picture's size


class PictureTask(PipelineTask):
    """The inputs that a pipeline takes beside a picture."""

    controlled: PipelineTask | None = None  # with a ControlNet that was added to the model


class VideoTask(Data):
    """The inputs of a pipeline that makes videos, beside those of a picture."""

    frames: Positive  # default
    multiple: Positive  # a video has the default number of frames, or so many times this more or less
    fps: float  # default: frames a second
    max_frames: Positive


class ModelDescription(Data):
    """The inputs that a model takes, and its defaults, read from its configuration without weights."""

    model: str  # as it was given: a folder or a hub repo id
    revision: str
    text_digest: str = ""  # equal for models whose text stages are; empty: it can't be told
    vae_digest: str = ""  # likewise of their vae stages
    worker_digests: tuple[tuple[Stage, str], ...] = ()  # of stages: equal where one's worker does the other's tasks
    pipeline: str  # class name in diffusers
    size_multiple: Positive  # pixels
    width: Positive  # default, pixels
    height: Positive
    max_pixels: Positive
    steps: Positive
    guidance: float | None  # default; None where the denoiser takes none
    cfg_scale: float | None  # default; None where the pipeline has no true CFG
    prompt: bool = True  # it takes one
    negative_prompt: bool
    own_size: bool = False  # its files say a size, which holds for what is made of pictures, too
    max_sequence_length: int | None  # default; None where the pipeline has no such argument
    max_sequence_limit: Positive  # tokens that fit a prompt at most
    image: PictureTask | None = None  # what is made of a picture; None: nothing
    inpaint: PictureTask | None = None  # what is made of a picture and a mask
    control: bool = False  # it takes a picture that a ControlNet keeps to
    ip_adapter: bool = False  # it has one, and needs a picture for it
    control_mask: bool = False  # a mask goes with that picture, and needs no other
    controlled: PipelineTask | None = None  # with a ControlNet that was added to the model
    refined: bool = False  # a refiner makes the last steps
    of_video: PipelineTask | None = None  # what is made of a video
    video: VideoTask | None = None  # it makes videos; None: pictures
    several: bool = True  # it makes several pictures, or videos, of one prompt at once
    settings: tuple[Setting, ...] = ()  # further arguments of its call
    needs: tuple[str, ...] = ()  # `image`, `mask` or names of videos that it can't do without
    demo: bool = False

"""The way from a request to a recipe: every default settled, everything that can't work refused before it is queued."""

import math
import secrets
from collections.abc import Callable, Sequence

from protocol.errors import BadRequest, DoesNotFit
from protocol.job import MAX_SEED, JobRequest, Recipe
from protocol.lora import Lora, check_weight
from protocol.model import ModelDescription, PipelineTask
from protocol.settings import read_settings
from protocol.speedups import parse_speedup, tier_of

MAX_STEPS = 1000
MAX_IMAGES = 16
MAX_SCALE = 100.0
MAX_FPS = 240.0
WITHOUT_LORAS = {  # by speedup
    "compile": "compiled", "parallel": "shared out among GPUs", "quantize": "quantized", "fuse-qkv": "fused",
}  # fmt: skip
DRAWN = -1  # a seed that stands for a random one, as everywhere in this field
MAX_PRIORITY = 1000

MOST_SPECIAL = 16  # tokens that a tokenizer adds to a text

CountTokens = Callable[[str], int]


def surely_fits(text: str, room: int) -> bool:
    """Return whether any tokenizer finds at most `room` tokens: each takes a character, unless it is special."""
    return text.isascii() and len(text) + MOST_SPECIAL <= room


def resolve(
    request: JobRequest,
    model: ModelDescription,
    dtype: str,
    count_tokens: CountTokens | None,
    speedups: tuple[str, ...] = (),
    picture_size: tuple[int, int] | None = None,
    video_frames: int | None = None,
    loras: Sequence[Lora] = (),
) -> Recipe:
    """The recipe of a request, in a stack with these speedups.

    `picture_size` is that of the first picture or video that it begins from, (width, height) in pixels, and
    `video_frames` the number of frames of its first video. `loras` are those that it names, as the stack has them.

    Raises:
        BadRequest: something in it can't be right.
        DoesNotFit: the picture, the number of pictures or the prompt is larger than the model takes.
    """
    task = check_pictures(request, model)
    width, height, sized = check_sizes(request, model, task, picture_size)
    check_range("steps", request.steps, 1, MAX_STEPS)
    check_range("num_images", request.num_images, 1, MAX_IMAGES)
    if request.num_images > 1 and not model.several:
        raise BadRequest(f"{model.pipeline} makes one at a time.", "For several, give several seeds: --seeds 1..4.")
    check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    check_range("seed", request.seed, DRAWN, MAX_SEED)
    frames, fps = check_frames(request, model, task, video_frames)
    length = check_prompts(request, model, count_tokens)
    defaults: ModelDescription | PipelineTask = task or model
    guidance, cfg_scale = check_guidance(request, model, defaults)
    if request.controlnet is not None and request.control is None:
        raise BadRequest(
            f"The ControlNet {request.controlnet!r} needs a picture that it keeps to.", "Give it: --control-image FILE."
        )
    if request.control is not None and not defaults.control:
        raise BadRequest(f"{defaults.pipeline} takes no control image.", "Leave --control-image out.")
    check_ip_adapter(request, model, task)
    check_loras(loras, speedups)
    return Recipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        steps=defaults.steps if request.steps is None else request.steps,
        guidance=guidance,
        cfg_scale=cfg_scale,
        seed=secrets.randbelow(2**32) if request.seed in (None, DRAWN) else request.seed,
        num_images=request.num_images,
        max_sequence_length=length,
        images=request.images,
        mask=request.mask,
        control=request.control,
        ip_image=request.ip_image,
        ip_scale=1.0 if request.ip_image and request.ip_scale is None else request.ip_scale,
        videos=named_videos(request, task),
        strength=request.strength,
        frames=frames,
        fps=fps,
        settings=read_settings(request.settings, defaults.settings, defaults.pipeline),
        loras=tuple(loras),
        sized=sized,
        model=model.model,
        revision=model.revision,
        text_digest=model.text_digest,
        dtype=dtype,
        tier=tier_of(speedups),
        speedups=speedups,
    )


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise BadRequest(f"{name} is {value}.", f"It goes from {low:g} to {high:g}.")


def check_pictures(request: JobRequest, model: ModelDescription) -> PipelineTask | None:
    """Return what is to be done with a request's pictures; None where that is the pipeline's own. BadRequest."""
    if "image" in model.needs and not request.images:
        raise BadRequest(f"{model.pipeline} begins from a picture.", "Give it: --image FILE.")
    if "mask" in model.needs and request.mask is None:
        raise BadRequest(f"{model.pipeline} needs a mask: white where the picture is made anew.", "Give --mask FILE.")
    task_of_videos = model.image if request.images else model.of_video
    given = {"image", "mask", *(name for name, _ in named_videos(request, task_of_videos))}
    if missing := [name for name in model.needs if name not in given]:
        raise BadRequest(f"{model.pipeline} needs a video: {missing[0]}.", f"Give it: --video {missing[0]}=FILE.")
    if not request.images:
        if request.mask is not None and not (model.control_mask and request.control):
            raise BadRequest("There is a mask without a picture.", "Give the picture, too: --image FILE.")
        if request.videos:
            return check_of_video(request, model, model.of_video)
        if request.strength is not None:
            raise BadRequest("A strength has no meaning without a picture.", "Give one: --image FILE.")
        return model.controlled if request.control is not None else None
    of_picture = model.image if request.mask is None else model.inpaint
    controlled = of_picture.controlled if of_picture and request.control is not None else None
    task = controlled or of_picture
    if task is None:
        what = "pictures" if request.mask is None else "masks"
        raise BadRequest(f"{model.pipeline} takes no {what}.", "Leave them out, or run another model.")
    if len(request.images) > 1 and not task.several:
        raise BadRequest(f"{task.pipeline} takes one picture; {len(request.images)} were given.", "Give one.")
    check_strength(request, task)
    return check_of_video(request, model, task) if request.videos else task


def check_ip_adapter(request: JobRequest, model: ModelDescription, task: PipelineTask | None) -> None:
    """Raise BadRequest where an IP-Adapter has no picture, or a picture no IP-Adapter."""
    if request.ip_image is None and model.ip_adapter:
        raise BadRequest("This stack's IP-Adapter needs a picture.", "Give it: --ip-image FILE.")
    if request.ip_image is not None and not model.ip_adapter:
        raise BadRequest("This stack has no IP-Adapter.", "Leave --ip-image out, or start one with --ip-adapter.")
    if request.ip_image is not None and task is not None and not task.ip_image:
        raise BadRequest(f"{task.pipeline} goes by no IP-Adapter.", "Leave --image, --mask or --control-image out.")
    if request.ip_scale is not None and request.ip_image is None:
        raise BadRequest("An IP-Adapter's scale has no meaning without its picture.", "Give it: --ip-image FILE.")
    check_range("ip_scale", request.ip_scale, 0, 10)


def check_loras(loras: Sequence[Lora], speedups: Sequence[str]) -> None:
    """Raise BadRequest for LoRAs that can't go together, or that a stack with these speedups can't take."""
    for lora in loras:
        check_weight(lora.name, lora.weight)
    if len({lora.digest for lora in loras}) < len(loras):
        raise BadRequest("The same LoRA is given twice.", "Give it once, with the weights' sum.")
    for stage, name, _ in map(parse_speedup, speedups):
        if loras and (why := WITHOUT_LORAS.get(name)):
            raise BadRequest(
                f"This stack's {stage} is {why}, and takes no LoRAs.", "Leave --lora out, or start another."
            )


def check_strength(request: JobRequest, task: PipelineTask) -> None:
    check_range("strength", request.strength, 0, 1)
    if request.strength is not None and task.strength is None:
        raise BadRequest(f"{task.pipeline} takes no strength.", "Leave it out.")


def check_of_video(request: JobRequest, model: ModelDescription, task: PipelineTask | None) -> PipelineTask:
    """Check the videos that a job begins from against what its pipeline takes; BadRequest."""
    if task is None or not task.videos:
        raise BadRequest(f"{task.pipeline if task else model.pipeline} takes no videos.", "Leave them out.")
    if unknown := [name for name, _ in request.videos if name and name not in task.videos]:
        raise BadRequest(f"{task.pipeline} takes no {unknown[0]!r}.", f"It takes {', '.join(task.videos)}.")
    names = [name for name, _ in named_videos(request, task)]
    if len(set(names)) < len(names):
        raise BadRequest("A video is given twice.", f"{task.pipeline} takes {', '.join(task.videos)}, one of each.")
    check_strength(request, task)
    return task


def named_videos(request: JobRequest, task: PipelineTask | None) -> tuple[tuple[str, str], ...]:
    """Return a request's videos by the names of the pipeline's call."""
    if task is None or not task.videos:
        return ()
    return tuple(sorted((name or task.videos[0], digest) for name, digest in request.videos))


def check_sizes(
    request: JobRequest, model: ModelDescription, task: PipelineTask | None, picture: tuple[int, int] | None
) -> tuple[int, int, bool]:
    """Width and height in pixels, and whether they are given to the pipeline; else they are an estimate."""
    given = request.width is not None or request.height is not None
    if task is None or (given and task.sized) or (model.own_size and task.sized):
        return *check_size(request.width, request.height, model), True
    if given:
        raise BadRequest(f"{task.pipeline} makes a picture of the size of the one given.", "Leave the size out.")
    width, height = (model.width, model.height) if task.sized or picture is None else picture
    if width * height > model.max_pixels:
        raise DoesNotFit(
            f"The picture has {width}x{height} pixels; {task.pipeline} makes one of the same size.",
            f"At most {model.max_pixels} fit: make it smaller.",
        )
    return width, height, False


def check_frames(
    request: JobRequest, model: ModelDescription, task: PipelineTask | None, of_video: int | None
) -> tuple[int | None, float | None]:
    """Frames, and frames a second, of a video; (None, None) where pictures are made. BadRequest, DoesNotFit."""
    video = model.video
    if video is None:
        for name, value in (("frames", request.frames), ("fps", request.fps)):
            if value is not None:
                raise BadRequest(f"{model.pipeline} makes pictures, not videos.", f"Leave --{name} out.")
        return None, None
    check_range("fps", request.fps, 1, MAX_FPS)
    if task and request.videos and not task.frames:
        if request.frames not in (None, of_video):
            raise BadRequest(f"{task.pipeline} makes as many frames as the video has.", "Leave --frames out.")
        return of_video or video.frames, video.fps if request.fps is None else request.fps
    frames = video.frames if request.frames is None else request.frames
    if frames <= 0:
        raise BadRequest(f"frames is {frames}.", f"It must be positive, such as {video.frames}.")
    if frames > video.max_frames:
        raise DoesNotFit(f"{frames} frames are too many for {model.pipeline}.", f"At most {video.max_frames} fit.")
    more = video.frames % video.multiple
    if all((frames - rest) % video.multiple for rest in (more, 1)):
        below = (frames - more) // video.multiple * video.multiple + more
        nearest = below if below > 0 and frames - below <= below + video.multiple - frames else below + video.multiple
        which = f"{more} more than a multiple" if more else "a multiple"
        raise BadRequest(f"{frames} frames are not {which} of {video.multiple}.", f"The nearest are {nearest}.")
    return frames, video.fps if request.fps is None else request.fps


def check_size(width: int | None, height: int | None, model: ModelDescription) -> tuple[int, int]:
    """Width and height in pixels, in the model's multiple and within its limit."""
    width, height = model.width if width is None else width, model.height if height is None else height
    multiple = model.size_multiple
    for name, value in (("width", width), ("height", height)):
        if value <= 0:
            raise BadRequest(
                f"{name} is {value}.", f"It must be a positive multiple of {multiple}, such as {model.width}."
            )
    if width * height > model.max_pixels:
        scale = math.sqrt(model.max_pixels / (width * height))
        fits = (max(multiple, int(side * scale) // multiple * multiple) for side in (width, height))
        raise DoesNotFit(
            f"{width}x{height} is too large for {model.pipeline}.",
            f"At most {model.max_pixels} pixels fit, such as {'x'.join(map(str, fits))}.",
        )
    if width % multiple or height % multiple:
        fits = (max(multiple, round(side / multiple) * multiple) for side in (width, height))
        raise BadRequest(
            f"{width}x{height} is not in multiples of {multiple} pixels.", f"The nearest is {'x'.join(map(str, fits))}."
        )
    return width, height


def check_prompts(request: JobRequest, model: ModelDescription, count_tokens: CountTokens | None) -> int | None:
    """The sequence length in tokens that both prompts fit; None where the pipeline has no such argument."""
    if request.prompt and not model.prompt:
        raise BadRequest(f"{model.pipeline} takes no prompt.", "Leave it out.")
    if model.prompt and not request.prompt.strip():
        raise BadRequest("The prompt is empty.", "Say what the picture should show.")
    length = request.max_sequence_length
    if length is not None and model.max_sequence_length is None:
        raise BadRequest(f"{model.pipeline} takes no max_sequence_length.", "Leave it out.")
    check_range("max_sequence_length", length, 1, model.max_sequence_limit)
    if length is None:
        length = model.max_sequence_length
    room = model.max_sequence_limit if length is None else length
    for name, text in prompts_of(request):
        tokens = count_tokens(text) if count_tokens and not surely_fits(text, room) else 0
        if tokens > room:
            longer = model.max_sequence_length is not None and tokens <= model.max_sequence_limit
            hint = f"Or give --max-sequence-length {tokens}." if longer else ""
            raise DoesNotFit(f"The {name} has {tokens} tokens; {room} fit. Shorten it.", hint)
    return length


def prompts_of(request: JobRequest) -> list[tuple[str, str]]:
    """Return (what it is, text) of all that is to be encoded."""
    negative = [] if request.negative_prompt is None else [("negative prompt", request.negative_prompt)]
    return [("prompt", request.prompt), *negative]


def texts_to_count(request: JobRequest, model: ModelDescription) -> list[str]:
    """Return the texts of which a tokenizer must say whether they fit."""
    length = request.max_sequence_length or model.max_sequence_length or model.max_sequence_limit
    return [text for _, text in prompts_of(request) if not surely_fits(text, length)]


def check_guidance(
    request: JobRequest, model: ModelDescription, defaults: ModelDescription | PipelineTask
) -> tuple[float | None, float | None]:
    """Distilled guidance and true CFG scale, each None where the model has none. What they mean is the pipeline's."""
    check_range("guidance", request.guidance, 0, MAX_SCALE)
    check_range("cfg_scale", request.cfg_scale, 0, MAX_SCALE)
    if request.guidance is not None and defaults.guidance is None:
        raise BadRequest(f"{model.model!r} takes no distilled guidance.", "Leave --guidance out.")
    if request.cfg_scale is not None and defaults.cfg_scale is None:
        raise BadRequest(f"{model.pipeline} has no true classifier-free guidance.", "Leave --cfg-scale out.")
    if request.negative_prompt is not None and not model.negative_prompt:
        raise BadRequest(f"{model.pipeline} takes no negative prompt.", "Leave it out.")
    cfg_scale = defaults.cfg_scale if request.cfg_scale is None else request.cfg_scale
    return (defaults.guidance if request.guidance is None else request.guidance), cfg_scale

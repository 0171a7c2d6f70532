"""The description of a model, found in its configuration and in its pipeline's own code; no weights are read.

The pipeline's checks hold the multiple of its sizes (`height % (self.vae_scale_factor * 2)`), its signature the
defaults, its denoiser's configuration whether distilled guidance is an input.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal

from diffusers import DiffusionPipeline

from protocol.errors import ModelMissing, TriptychError
from protocol.model import ModelDescription, PictureTask, PipelineTask, VideoTask
from protocol.model_spec import DEMO
from protocol.stages import Stage
from workers.errors import cause_of
from workers.models.call_settings import settings_of
from workers.models.skeleton import added_names, build_skeleton, pipeline_class
from workers.models.source import CONTROLNET, REFINER, Source
from workers.models.stage_digest import stage_digest, worker_digests
from workers.models.tasks import (
    FRAMES,
    IMAGES,
    IMAGES_PER_PROMPT,
    RATE,
    control_argument,
    controlnet_class,
    first_of,
    image_class,
    inpaint_class,
    needs_of,
    parameters_of,
    video_arguments,
    video_class,
)

SHARED: tuple[Stage, ...] = ("text", "vae")  # stages in which models may be alike
LARGEST = 4  # times the default number of pixels, or of frames
NEEDS: Mapping[Literal["image", "mask"], str] = {"image": "image", "mask": "mask_image"}  # names in a pipeline's call
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
USUAL_STEPS, USUAL_FRAMES, USUAL_RATE = (
    50,
    16,
    10,
)  # of pipelines that don't say; the rate is that of diffusers' export_to_video


def describe(source: Source) -> ModelDescription:
    """Describe a model; ModelMissing where its pipeline can't be run in stages, or can't be built."""
    pipeline_class(source)
    try:
        return describe_pipeline(source, build_skeleton(source))
    except (TriptychError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever its classes make of its files; a library's panic is no Exception
        raise ModelMissing(
            f"{source.model!r} can't be built as a {source.pipeline}: {cause_of(error)}.",
            "See what is wrong with it: triptych doctor --model.",
        ) from error


def describe_pipeline(source: Source, pipeline: DiffusionPipeline) -> ModelDescription:
    """Describe a pipeline by its configuration, its signature and its own code."""
    defaults = source.settings().get("defaults", {})
    width, height = default_size(pipeline)
    width, height = int(defaults.get("width", width)), int(defaults.get("height", height))
    parameters, cls = call_parameters(pipeline), type(pipeline)
    needs = needs_of(cls)
    true_cfg, distilled = guidance_arguments(pipeline)

    def default(name: str | None) -> Any:
        return defaults.get(name, parameters[name].default) if name else None

    digests = {stage: stage_digest(source, stage) for stage in SHARED}
    length = default("max_sequence_length") if "max_sequence_length" in parameters else None
    return ModelDescription(
        model=source.model,
        revision=source.revision,
        text_digest=digests["text"],
        vae_digest=digests["vae"],
        worker_digests=worker_digests(source, digests),
        pipeline=source.pipeline,
        size_multiple=size_multiple(pipeline),
        width=width,
        height=height,
        max_pixels=width * height * LARGEST,
        steps=int(default("num_inference_steps") or USUAL_STEPS),
        guidance=_float(default(distilled)),
        cfg_scale=_float(default(true_cfg)),
        prompt="prompt" in parameters,
        negative_prompt="negative_prompt" in parameters,
        max_sequence_length=length,
        max_sequence_limit=max(parameters["max_sequence_length"].default, length) if length else clip_length(pipeline),
        own_size="width" in defaults,
        image=picture_task(source, image_class(cls), pipeline, defaults),
        inpaint=picture_task(source, inpaint_class(cls), pipeline, defaults),
        control=control_argument(cls) is not None,
        ip_adapter=source.ip_adapter is not None,
        control_mask="control_mask" in parameters,
        controlled=controlled_task(source, cls, pipeline, defaults),
        refined=REFINER in source.added,
        of_video=pipeline_task(found, pipeline, defaults) if (found := video_class(cls)) else None,
        video=video_task(pipeline, defaults),
        several=first_of(IMAGES_PER_PROMPT, cls) is not None,
        settings=settings_of(cls),
        needs=(
            *(kind for kind, name in NEEDS.items() if name in needs and name != control_argument(cls)),
            *(name for name in video_arguments(cls) if name in needs),
        ),
        demo=source.model == DEMO,
    )


def video_task(pipeline: DiffusionPipeline, defaults: Mapping[str, Any]) -> VideoTask | None:
    """Describe the videos that a pipeline makes; None where it makes pictures."""
    name = first_of(FRAMES, type(pipeline))
    if name is None and not video_arguments(type(pipeline)):
        return None
    frames = int(defaults.get("frames") or (default_of(pipeline, name) if name else 0) or USUAL_FRAMES)
    rate = first_of(RATE, type(pipeline))
    told = (
        defaults.get("fps")
        or (default_of(pipeline, rate) if rate else None)
        or own_rate(pipeline)
        or example_rate(type(pipeline))
    )
    ratio = next((found for name in TEMPORAL if isinstance(found := getattr(pipeline, name, None), int)), 1)
    return VideoTask(frames=frames, multiple=ratio if name else 1, fps=float(told), max_frames=max(frames * LARGEST, 1))


def own_rate(pipeline: DiffusionPipeline) -> float | None:
    """Return the frames a second that a pipeline says its videos have; None where it says nothing."""
    found = getattr(pipeline, "fps", None)
    return found if isinstance(found, int | float) else None


def example_rate(cls: type[DiffusionPipeline]) -> int:
    """Return the frames a second with which a pipeline's own example writes its video."""
    found = re.search(r"\bfps=(\d+)", cls.__call__.__doc__ or "")
    return int(found[1]) if found else USUAL_RATE


def controlled_task(
    source: Source, cls: type[DiffusionPipeline], pipeline: DiffusionPipeline, defaults: Mapping[str, Any]
) -> PipelineTask | None:
    """Describe what `cls` does with the ControlNet beside the model; None where there is none for it."""
    if CONTROLNET not in added_names(source, type(pipeline)):
        return None
    found = controlnet_class(cls, source.index[CONTROLNET][1])
    if found is None or (cls is not type(pipeline) and not first_of(IMAGES, found)):  # it takes no picture besides
        return None
    return pipeline_task(found, pipeline, defaults)


def picture_task(
    source: Source, cls: type[DiffusionPipeline] | None, pipeline: DiffusionPipeline, defaults: Mapping[str, Any]
) -> PictureTask | None:
    """Describe what a pipeline class takes beside a picture, over the weights of `pipeline`; which may take several."""
    if cls is None:
        return None
    task = pipeline_task(cls, pipeline, defaults)
    return PictureTask(**dict(task), controlled=controlled_task(source, cls, pipeline, defaults))


def pipeline_task(
    cls: type[DiffusionPipeline], pipeline: DiffusionPipeline, defaults: Mapping[str, Any]
) -> PipelineTask:
    known = parameters_of(cls)
    true_cfg, distilled = guidance_arguments(pipeline, cls)

    def default(name: str | None) -> Any:
        return defaults.get(name, known[name].default) if name and name in known else None

    return PipelineTask(
        pipeline=cls.__name__,
        several=cls is type(pipeline) and first_of(FRAMES, cls) is None,
        steps=int(default("num_inference_steps") or USUAL_STEPS),
        guidance=_float(default(distilled)),
        cfg_scale=_float(default(true_cfg)),
        strength=_float(default("strength")),
        control=control_argument(cls) is not None,
        settings=settings_of(cls),
        videos=video_arguments(cls),
        frames=first_of(FRAMES, cls) is not None,
        ip_image="ip_adapter_image" in known,
        sized={"height", "width"} <= set(known),
    )


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def call_parameters(pipeline: DiffusionPipeline) -> Mapping[str, inspect.Parameter]:
    return parameters_of(type(pipeline))


def guidance_arguments(
    pipeline: DiffusionPipeline, cls: type[DiffusionPipeline] | None = None
) -> tuple[str | None, str | None]:
    """Names of a call's arguments for true CFG and for distilled guidance; the two are never merged.

    The call is that of `cls`, if given, over the weights of `pipeline`.

    `guidance_scale` is distilled where the denoiser's configuration says that it embeds guidance, or where the
    pipeline has a `true_cfg_scale` beside it; then it counts only if the denoiser embeds it.
    """
    parameters = parameters_of(cls or type(pipeline))
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    embeds = getattr(denoiser.config, "guidance_embeds", None) if denoiser is not None else None
    scale = "guidance_scale" if "guidance_scale" in parameters else None
    if "true_cfg_scale" in parameters:
        return "true_cfg_scale", scale if embeds else None
    if embeds is not None:
        return None, scale if embeds else None
    return scale, None


def default_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """(width, height) in pixels, as the pipeline's own call gives them."""
    width, height = default_of(pipeline, "width"), default_of(pipeline, "height")
    width = width or getattr(pipeline, "default_width", None)
    height = height or getattr(pipeline, "default_height", None)
    if width and height:
        return int(width), int(height)
    denoiser = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    sample = (
        getattr(pipeline, "default_sample_size", None)
        or getattr(getattr(denoiser, "config", None), "sample_size", None)
        or 128
    )
    rows, columns = sample if isinstance(sample, list | tuple) else (sample, sample)
    scale = vae_scale(pipeline)
    return int(columns * scale), int(rows * scale)


def vae_scale(pipeline: DiffusionPipeline) -> int:
    """Return the pixels of a picture's side that one of its latents stands for."""
    return next((int(found) for name in SPATIAL if (found := getattr(pipeline, name, None))), 8)


def default_of(pipeline: DiffusionPipeline, name: str) -> Any:
    """Return the default of a call's argument: that of its signature, or what its own code takes in its place.

    That is `name = name or …`, or `if name is None: name = …`; None for any other.
    """
    parameter = call_parameters(pipeline).get(name)
    if parameter is not None and parameter.default not in (None, parameter.empty):
        return parameter.default
    for node in ast.walk(_tree_of(inspect.unwrap(type(pipeline).__call__))):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.BoolOp(op=ast.Or(), values=[ast.Name(), own])) if (
                target == name
            ):
                return _constant(own, pipeline)
            case ast.If(test=test, body=body) if f"{name} is None" in ast.unparse(test):
                for line in body:
                    match line:
                        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=int(value))) if (
                            target == name
                        ):
                            return value
    return None


@functools.cache
def _tree_of(function: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def clip_length(pipeline: DiffusionPipeline) -> int:
    lengths = [
        t.model_max_length for name, t in pipeline.components.items() if name.startswith("tokenizer") and t is not None
    ]
    return int(min(max(lengths, default=77), 4096))


def size_multiple(pipeline: DiffusionPipeline) -> int:
    """The number that `check_inputs` divides the height by; twice the VAE's factor where it doesn't."""
    if check := getattr(type(pipeline), "check_inputs", None):
        for node in ast.walk(_tree_of(check)):
            match node:
                case ast.BinOp(left=ast.Name(id="height"), op=ast.Mod(), right=divisor):
                    value = _constant(divisor, pipeline)
                    if value:
                        return value
    return vae_scale(pipeline) * 2


def _constant(node: ast.expr, pipeline: DiffusionPipeline) -> int | None:
    """The value of a product of numbers and attributes of `self`."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Attribute():
            path = ast.unparse(node).split(".")
            found = (
                reduce(lambda owner, name: getattr(owner, name, None), path[1:], pipeline)
                if path[0] == "self"
                else None
            )
            return int(found) if isinstance(found, int) else None
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = _constant(left, pipeline), _constant(right, pipeline)
            return factors[0] * factors[1] if factors[0] and factors[1] else None
    return None

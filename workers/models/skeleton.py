"""A pipeline object without weights: real classes and configurations, parameters on the meta device."""

import contextlib
import importlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from safetensors import safe_open
from transformers import PretrainedConfig

from protocol.errors import ModelMissing
from workers.models.ip_adapter import adapt, check_ip_adapter, feature_extractor
from workers.models.modular import adapter_of
from workers.models.refined import refined, refiner_settings
from workers.models.source import CONTROLNET, REFINER, Source, is_component
from workers.models.tasks import controlnet_class, needs_of, parameters_of, takes, video_arguments
from workers.models.weight_files import read_json
from workers.replay.placeholder import said_to_be

PARTS = "uses the denoiser's parts outside of its forward, so that it can't be split"
TWO = "runs two pipelines in one, each with encoders and denoisers of its own"
OTHER = "makes no pictures or videos"
# What can't be told from a class: found by trying, or by what it returns.
NOT_SPLIT: Mapping[str, str] = {
    "Cosmos3OmniPipeline": PARTS, "StableDiffusionSAGPipeline": "reads its denoiser's attention maps",
    "MotifVideoImage2VideoPipeline": PARTS, "KandinskyCombinedPipeline": TWO, "KandinskyImg2ImgCombinedPipeline": TWO,
    "KandinskyInpaintCombinedPipeline": TWO, "KandinskyV22CombinedPipeline": TWO,
    "KandinskyV22Img2ImgCombinedPipeline": TWO, "KandinskyV22InpaintCombinedPipeline": TWO,
    "StableCascadeCombinedPipeline": TWO, "WuerstchenCombinedPipeline": TWO, "StableUnCLIPPipeline": TWO,
    "KandinskyPriorPipeline": OTHER, "KandinskyV22PriorPipeline": OTHER, "KandinskyV22PriorEmb2EmbPipeline": OTHER,
    "StableCascadePriorPipeline": OTHER, "WuerstchenPriorPipeline": OTHER, "LLaDA2Pipeline": OTHER,
    "DiffusionGemmaPipeline": OTHER, "ShapEPipeline": OTHER, "AceStepPipeline": OTHER, "LongCatAudioDiTPipeline": OTHER,
    "StableAudio3Pipeline": OTHER, "StableAudio3AudioToAudioPipeline": OTHER, "StableAudio3InpaintPipeline": OTHER,
    "LTX2HDRPipeline": "makes light of any strength, and no pictures", "MarigoldDepthPipeline": OTHER,
    "MarigoldIntrinsicsPipeline": OTHER, "MarigoldNormalsPipeline": OTHER,
    "SanaWMPipeline": "needs the intrinsics of a camera, which a job can't give",
    "StableDiffusionParadigmsPipeline": "calls back with an index beyond its list, which is a fault of its own",
    "StableDiffusionDiffEditPipeline": "needs image_latents, which a job can't give",
    "StableDiffusionPix2PixZeroPipeline": "needs source_embeds and target_embeds, which a job can't give",
    "StableDiffusionGLIGENPipeline": "needs gligen_boxes, which a job can't give",
    "StableDiffusionGLIGENTextImagePipeline": "needs gligen_boxes, which a job can't give",
    "IFImg2ImgSuperResolutionPipeline": "needs original_image, which a job can't give",
    "IFInpaintingSuperResolutionPipeline": "needs original_image, which a job can't give",
    "QwenImageLayeredPipeline": "makes layers with alpha, which pictures here don't have",
    "UniDiffuserPipeline": "makes pictures or texts, whichever is missing",
}  # fmt: skip
SHARED_SIZES = {"cross_attention_dim", "joint_attention_dim", "pooled_projection_dim", "caption_channels"}
GIVEN = ("image", "mask_image", "control_image")  # beside the prompt, that a job can bring


def component_class(source: Source, name: str) -> Any:
    """The class that model_index.json names for a component, from diffusers or transformers and nowhere else."""
    library, cls = source.index[name]
    own = library not in ("diffusers", "transformers")
    if own and importlib.util.find_spec("diffusers.pipelines." + library.partition(".")[0]) is None:
        raise ModelMissing(
            f"{source.model!r} wants {cls} from {library!r}.", "Only diffusers and transformers are used."
        )
    found = getattr(importlib.import_module(f"diffusers.pipelines.{library}" if own else library), cls, None)
    if found is None:
        raise ModelMissing(f"{source.model!r} wants {library}.{cls}, which this {library} doesn't have.", "Update it.")
    return found


def pipeline_class(source: Source) -> type[DiffusionPipeline]:
    """The class that model_index.json names, if it can be run in stages; else ModelMissing."""
    try:
        found = getattr(diffusers, source.pipeline, None)
    except (ImportError, RuntimeError) as error:  # of what it needs besides
        raise ModelMissing(f"{source.model!r} is a {source.pipeline}, which can't be imported: {error}.") from error
    if isinstance(found, type) and issubclass(found, ModularPipeline):
        found = adapter_of(source.model, found, source.blocks)
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ModelMissing(
            f"{source.model!r} is a {source.pipeline!r}, which diffusers {diffusers.__version__} doesn't have.",
            "Update diffusers, or choose another model.",
        )
    if why := refusal(found):
        raise ModelMissing(
            f"{source.model!r} is a {source.pipeline}, which {why}.",
            "Triptych runs diffusers pipelines that make pictures or videos of prompts and pictures.",
        )
    if CONTROLNET in source.added:
        check_controlnet(source, found)
    if REFINER in source.added:
        found = refined(source, found)
    if source.ip_adapter:
        check_ip_adapter(source, found)
    return found


def check_controlnet(source: Source, cls: type[DiffusionPipeline]) -> None:
    """Check that a ControlNet from elsewhere goes with a model; ModelMissing."""
    given, name = str(source.added[CONTROLNET]), source.index[CONTROLNET][1]
    if not takes(cls, name) and controlnet_class(cls, name) is None:
        raise ModelMissing(
            f"{given!r} is a {name}, which doesn't go with a {cls.__name__}.", "Choose a ControlNet for this model."
        )
    mine = read_json(source.folder_of(CONTROLNET) / "config.json")
    for denoiser in ("transformer", "unet"):
        if denoiser in source.index:
            other = read_json(source.folder_of(denoiser) / "config.json")
            for key in SHARED_SIZES & mine.keys() & other.keys():
                if mine[key] != other[key]:
                    raise ModelMissing(
                        f"{given!r} is for another model: its {key} is {mine[key]}, the {denoiser}'s {other[key]}.",
                        "Choose a ControlNet for this model.",
                    )


def refusal(cls: type[DiffusionPipeline]) -> str:
    """Return why a pipeline class can't be run in stages; empty if it can."""
    parameters = parameters_of(cls)
    if why := NOT_SPLIT.get(cls.__name__):
        return why
    if needed := [name for name in needs_of(cls) if name not in (*GIVEN, *video_arguments(cls))]:
        return f"needs {', '.join(needed)}, which a job can't give"
    if sound := [name for name in parameters if name in ("audio_length_in_s", "audio_end_in_s")]:
        return f"makes sound alone ({sound[0]})"
    if "prompt" not in parameters and not (
        "image" in parameters and "vae" in inspect.signature(cls.__init__).parameters
    ):
        return "takes neither a prompt nor a picture to be encoded"
    if "num_inference_steps" not in parameters:
        return "takes no num_inference_steps, so that nothing can be told of its steps"
    return ""


def build_skeleton(source: Source, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Build the pipeline with placeholders for all components with weights, said to be on the CPU."""
    cls = pipeline_class(source)
    parts = {name: without_weights(source, name, torch.device("cpu"), dtype) for name in expected_components(cls)}
    return cls(**parts, **plain_settings(source, cls))


def without_weights(source: Source, name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a component for a stage without its weights: a placeholder, or itself if it has none; None if absent."""
    if name not in source.index:
        return feature_extractor(source) if source.ip_adapter and name == "feature_extractor" else None
    cls: Any = component_class(source, name)
    if not has_weights(cls):
        return cls.from_pretrained(source.folder_of(name))
    if issubclass(cls, ModelMixin):
        with init_empty_weights(include_buffers=False):
            module = of_config(cls, source, name)
        _load_buffers(module, source, name)
        adapt(source, name, module)
        return said_to_be(module.to(dtype), device, dtype)
    return said_to_be(of_transformers(source, name), device, dtype)


def added_names(source: Source, cls: type[DiffusionPipeline]) -> list[str]:
    """Return the names of components that lie beside a model and that its own pipeline has no place for."""
    return sorted(source.added.keys() - expected_components(cls))


def expected_components(cls: type[DiffusionPipeline]) -> set[str]:
    modules, _ = cls._get_signature_keys(cls)
    return set(modules) - {"self"}


def plain_settings(source: Source, cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """The constructor's plain settings that model_index.json holds, such as force_zeros_for_empty_prompt."""
    raw = json.loads(source.index_file.read_text())
    _, optional = cls._get_signature_keys(cls)
    found = {name: raw[name] for name in optional if name in raw and not is_component(raw[name])}
    return found | ({"refiner_settings": refiner_settings(source)} if REFINER in source.added else {})


def has_weights(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, torch.nn.Module)


def on_meta(source: Source, name: str) -> torch.nn.Module | None:
    """Return a component on the meta device; None if it has no weights."""
    cls = component_class(source, name)
    if not has_weights(cls):
        return None
    if not issubclass(cls, ModelMixin):
        return of_transformers(source, name)
    with init_empty_weights():
        model: torch.nn.Module = of_config(cls, source, name)
    return model


def of_config(cls: Any, source: Source, name: str) -> ModelMixin:
    model: ModelMixin = cls.from_config(cls.load_config(source.folder_of(name)))
    return model


def of_transformers(source: Source, name: str) -> torch.nn.Module:
    """Return a model of transformers on the meta device, with its tied weights tied."""
    cls = component_class(source, name)
    with torch.device("meta"):
        model: torch.nn.Module = cls(text_config(cls, source, name))
    return model


def text_config(cls: Any, source: Source, name: str) -> Any:
    """Return the configuration of a text encoder; that of the encoder's half where a file holds both halves'."""
    config = cls.config_class.from_pretrained(source.folder_of(name))
    half = getattr(config, "encoder", None)
    return half if isinstance(half, PretrainedConfig) and cls.__name__.endswith("Encoder") else config


def _load_buffers(model: torch.nn.Module, source: Source, name: str) -> None:
    wanted = dict(model.named_buffers())
    if not wanted:
        return
    for path in sorted(source.folder_of(name).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in wanted.keys() & set(file.keys()):
                wanted[key].copy_(file.get_tensor(key))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Load without the libraries' progress bars and advice."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    yield

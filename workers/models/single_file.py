"""Weights as one file beside a model's folder: safetensors by whatever names its trainer gave, or GGUF.

It holds a denoiser, or a whole model: its VAE and text encoders, too. diffusers reads it. What is computed with as it
lies in a safetensors file stays mapped, and can be streamed; what a GGUF file holds is copied into memory, and is on a
GPU as a whole.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import GGUFQuantizationConfig, ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    LDM_VAE_KEYS,
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
    fetch_diffusers_config,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
    load_single_file_checkpoint,
)
from transformers import T5EncoderModel

from protocol.errors import BadRequest, ModelMissing
from workers.errors import cause_of
from workers.models.skeleton import component_class
from workers.models.source import DENOISERS, GGUF, Source
from workers.models.weight_files import DTYPES, Damaged, check_file, header_of

LANGUAGE_MODELS = re.compile(r"llama|qwen2|qwen3|gemma|phi|mistral|gpt|t5", re.IGNORECASE)


def load_single(source: Source, name: str, cls: Any, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Load a component from its single file, as diffusers does with the configuration of the model; ModelMissing."""
    path = source.single[name]
    if not issubclass(cls, ModelMixin):
        return load_encoder(source, name, cls, arguments)
    given = dict(arguments)
    if path.suffix.lower() == GGUF:
        given["quantization_config"] = gguf_config(path, given["dtype"])
    try:
        loadable(cls)
        module = cls.from_single_file(str(path), config=str(source.folder), subfolder=name, **given)
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError, TypeError, IndexError) as error:
        raise not_for(source, name, cause_of(error)) from error
    return whole(source, name, module)


def load_encoder(source: Source, name: str, cls: Any, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Load a text encoder from a file that holds a whole model; ModelMissing."""
    if "quantization_config" in arguments:
        raise BadRequest(f"The {name} of a model that is one file can't be quantized.", "Leave --quantize out.")
    try:
        checkpoint = load_single_file_checkpoint(str(source.single[name]))
        clip = is_clip_model_in_single_file(cls, checkpoint)
        create = create_diffusers_clip_model_from_ldm if clip else create_diffusers_t5_model_from_checkpoint
        module = create(
            cls, checkpoint, config=str(source.folder), subfolder=name, torch_dtype=arguments["dtype"],
            local_files_only=True,
        )  # fmt: skip
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError, TypeError, IndexError) as error:
        raise not_for(source, name, cause_of(error)) from error
    return whole(source, name, module)


def whole(source: Source, name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Return a component that a file has given, once none of its weights is missing; ModelMissing."""
    remove_hook_from_module(module, recurse=True)
    if lacking := [key for key, parameter in module.named_parameters() if parameter.is_meta]:
        raise not_for(source, name, f"it lacks {lacking[0]}")
    return module.eval()


def base_of(path: Path) -> str:
    """Return the hub id of the model whose configuration a file goes by, as diffusers finds it; ModelMissing."""
    try:
        return str(fetch_diffusers_config(shapes_in(path))["pretrained_model_name_or_path"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelMissing(
            f"diffusers can't say what {path.name!r} was made from: {cause_of(error)}.", "Say it: --base MODEL."
        ) from error


def held_in(path: Path, source: Source) -> list[str]:
    """Return the components of a model whose weights a file holds; ModelMissing where its denoiser isn't among them."""
    stored, found = shapes_in(path), []
    for name in source.index:
        cls = component_class(source, name)
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            continue
        encoder = is_clip_model_in_single_file(cls, stored)
        encoder |= issubclass(cls, T5EncoderModel) and is_t5_in_single_file(stored)
        vae = name == "vae" and any(key.startswith(tuple(LDM_VAE_KEYS)) for key in stored)
        if name in DENOISERS or encoder or vae:
            found.append(name)
    if not set(DENOISERS) & set(found):
        raise ModelMissing(
            f"{path.name!r} can't be taken for a {source.pipeline}, which has no denoiser that a file could hold.",
            "Name the model that it was made from: --base MODEL.",
        )
    return found


def shapes_in(path: Path) -> dict[str, Any]:
    """Return a file's tensors without their data, on the meta device; Damaged."""
    return {
        key: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for key, tensor in header_of(path).items()
        if tensor.dtype in DTYPES
    }


def check_single(source: Source, name: str, cls: Any, wanted: Mapping[str, torch.Tensor], config: Any) -> None:
    """Check by its header alone that a file holds what a component wants; Damaged, ModelMissing.

    Of a text encoder loading decides: `held_in` has found it there.
    """
    path = source.single[name]
    if not issubclass(cls, ModelMixin):
        return
    loadable(cls)
    if path.suffix.lower() == GGUF:
        check_file(path)
        gguf_config(path, torch.float32)
        architecture = gguf_architecture(path)
        if LANGUAGE_MODELS.search(architecture):
            raise not_for(source, name, f"it is a language model ({architecture})")
        return
    stored = shapes_in(path)
    if not wanted.keys() <= stored.keys():
        try:
            stored = converted(cls, config, stored)
        except Exception as error:
            raise not_for(source, name, cause_of(error)) from error
    for key, tensor in wanted.items():
        if key not in stored:
            raise not_for(source, name, f"it lacks {key}")
        if stored[key].shape != tensor.shape:
            raise not_for(source, name, f"its {key} has the shape {list(stored[key].shape)}, not {list(tensor.shape)}")


def converted(cls: Any, config: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint by the names of diffusers, as `from_single_file` converts it."""
    mapping = SINGLE_FILE_LOADABLE_CLASSES[loadable(cls)]["checkpoint_mapping_fn"]
    found: dict[str, Any] = mapping(config=dict(config), checkpoint=stored)
    return found


def loadable(cls: Any) -> str:
    """Return diffusers' name for how a class is loaded from one file; BadRequest where it isn't."""
    names = [str(one.__name__) for one in cls.__mro__]
    found = next((name for name in names if name in SINGLE_FILE_LOADABLE_CLASSES), None)
    if found is None:
        raise BadRequest(f"A {cls.__name__} can't be loaded from one file.", "Give its model as a folder.")
    return found


def gguf_config(path: Path, dtype: torch.dtype) -> GGUFQuantizationConfig:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BadRequest(f"{path.name} needs gguf.", 'Install it: pip install "triptych[gguf]".') from error
    return GGUFQuantizationConfig(compute_dtype=dtype)


def gguf_architecture(path: Path) -> str:
    """Return the architecture that a GGUF file names; Damaged."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(path).get_field("general.architecture")
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise Damaged(path.name, f"is no GGUF file, or is damaged: {error}", "Download it again.") from error
    return str(field.contents()) if field else ""


def not_for(source: Source, name: str, reason: str) -> ModelMissing:
    file = source.single[name].name
    if Path(source.model).name == file:
        return ModelMissing(
            f"{file!r} is no {source.pipeline}, or lacks its {name}: {reason}.",
            "Name the model that it was made from: --base MODEL.",
        )
    return ModelMissing(
        f"{file!r} is not for the {name} of {source.model!r}: {reason}.",
        "Give another to --transformer, or the --model that it was made for.",
    )

"""A denoiser's weights as one file beside a model's folder: safetensors by whatever names its trainer gave, or GGUF.

diffusers reads it. What is computed with as it lies in a safetensors file stays mapped, and can be streamed; what a
GGUF file holds is copied into memory, and is on a GPU as a whole.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import GGUFQuantizationConfig
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from protocol.errors import BadRequest, ModelMissing
from workers.errors import cause_of
from workers.models.source import GGUF, Source
from workers.models.weight_files import DTYPES, Damaged, check_file, header_of

LANGUAGE_MODELS = re.compile(r"llama|qwen2|qwen3|gemma|phi|mistral|gpt|t5", re.IGNORECASE)


def load_single(source: Source, name: str, cls: Any, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Load a component from its single file, as diffusers does with the configuration of the model; ModelMissing."""
    path = source.single[name]
    given = dict(arguments)
    if path.suffix.lower() == GGUF:
        given["quantization_config"] = gguf_config(path, given["dtype"])
    try:
        loadable(cls)
        module = cls.from_single_file(str(path), config=str(source.folder), subfolder=name, **given)
    except (ValueError, KeyError, RuntimeError, OSError, AttributeError, TypeError, IndexError) as error:
        raise not_for(source, name, cause_of(error)) from error
    remove_hook_from_module(module, recurse=True)
    if lacking := [key for key, parameter in module.named_parameters() if parameter.is_meta]:
        raise not_for(source, name, f"it lacks {lacking[0]}")
    loaded: torch.nn.Module = module.eval()
    return loaded


def check_single(source: Source, name: str, cls: Any, wanted: Mapping[str, torch.Tensor], config: Any) -> None:
    """Check by its header alone that a file holds what a component wants; Damaged, ModelMissing."""
    path = source.single[name]
    loadable(cls)
    if path.suffix.lower() == GGUF:
        check_file(path)
        gguf_config(path, torch.float32)
        architecture = gguf_architecture(path)
        if LANGUAGE_MODELS.search(architecture):
            raise not_for(source, name, f"it is a language model ({architecture})")
        return
    tensors = header_of(path)
    stored: dict[str, Any] = {
        key: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
        for key, tensor in tensors.items()
        if tensor.dtype in DTYPES
    }
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
        raise BadRequest(f"A {cls.__name__} can't be loaded from one file.", "Leave --transformer out.")
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
    return ModelMissing(
        f"{source.single[name].name!r} is not for the {name} of {source.model!r}: {reason}.",
        "Give another to --transformer, or the --model that it was made for.",
    )

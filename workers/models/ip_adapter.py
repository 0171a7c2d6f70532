"""An IP-Adapter beside a model: weights that let the denoiser attend to an encoded picture, and that encoder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from protocol.errors import ModelMissing
from workers.models.source import Source
from workers.models.tasks import parameters_of

DENOISERS = ("unet", "transformer")
PARTS = ("image_proj", "ip_adapter")


def check_ip_adapter(source: Source, cls: type[DiffusionPipeline]) -> None:
    """Check that a pipeline class takes IP-Adapters, and that a file is one; ModelMissing."""
    if not hasattr(cls, "load_ip_adapter") or "ip_adapter_image" not in parameters_of(cls):
        raise ModelMissing(f"A {cls.__name__} takes no IP-Adapter.", "Leave --ip-adapter out, or run another model.")
    weights = read_weights(source.ip_adapter)
    if any("lora" in name for name in weights["ip_adapter"]):
        raise ModelMissing(f"{str(source.ip_adapter)!r} is an IP-Adapter with LoRAs (FaceID), which are not taken yet.")


def read_weights(path: Path | None, device: str = "cpu") -> dict[str, dict[str, torch.Tensor]]:
    """Return an IP-Adapter's weights, as `load_ip_adapter` takes them; ModelMissing for another file."""
    found: dict[str, dict[str, torch.Tensor]] = {part: {} for part in PARTS}
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(".")
                if part in found:
                    found[part][name] = file.get_tensor(key).to(device)
    except (OSError, SafetensorError) as error:
        raise ModelMissing(f"{str(path)!r} can't be read: {error}.", "Download it again.") from error
    if not all(found.values()):
        raise ModelMissing(f"{str(path)!r} is no IP-Adapter: it has no image_proj and ip_adapter.", "Give another.")
    return found


def adapt(source: Source, name: str, model: Any) -> None:
    """Put an IP-Adapter's weights into a denoiser, on the device where that is; ModelMissing."""
    if source.ip_adapter is None or name not in DENOISERS:
        return
    weights = read_weights(source.ip_adapter, next(model.parameters()).device.type)
    try:
        model._load_ip_adapter_weights([weights])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelMissing(
            f"{str(source.ip_adapter)!r} doesn't go with {source.model!r}: {str(error).splitlines()[0]}",
            "Choose an IP-Adapter for this model.",
        ) from error


def feature_extractor(source: Source) -> Any:
    """Return what makes an encoder's input of a picture, where the model brings none, as `load_ip_adapter` does it."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    side = CLIPVisionConfig.from_pretrained(source.folder_of("image_encoder")).image_size
    return CLIPImageProcessor(size=side, crop_size=side)

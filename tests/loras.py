"""LoRAs with random weights, as files in diffusers' own layout; and the plain pipeline's pictures with them."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from protocol.lora import Lora
from tests import tiny


def write_lora(
    pipeline: DiffusionPipeline,
    folder: Path,
    name: str,
    layers: Sequence[str],
    component: str = "transformer",
    rank: int = 2,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
    dora: bool = False,
) -> Lora:
    """Write a LoRA of a component's linear layers whose names end so; as a file named by its digest, as stacks do."""
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in getattr(pipeline, component).named_modules():
        if isinstance(layer, torch.nn.Linear) and any(path.endswith(end) for end in layers):
            down = torch.randn(rank, layer.in_features, generator=generator) * 0.3
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.3
            tensors |= {f"{component}.{path}.lora_A.weight": down, f"{component}.{path}.lora_B.weight": up}
            if dora:
                magnitude = torch.rand(layer.out_features, generator=generator) + 0.5
                tensors[f"{component}.{path}.lora_magnitude_vector"] = magnitude
    assert tensors
    return keep(tensors, folder, name, dtype, metadata)


def keep(
    tensors: dict[str, torch.Tensor],
    folder: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Lora:
    """Write tensors as a LoRA's file, named by its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{name}.safetensors"
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, place, metadata)
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    place.rename(folder / f"{digest}.safetensors")
    return Lora(name=name, digest=digest, weight=1.0)


def plain(folder: Path, loras: Sequence[Lora], kept: Path, **arguments: Any) -> torch.Tensor:
    """The plain pipeline's picture with LoRAs loaded as its documentation says."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        for lora in loras:
            pipeline.load_lora_weights(str(kept / f"{lora.digest}.safetensors"), adapter_name=lora.name)
    if loras:
        pipeline.set_adapters([lora.name for lora in loras], [lora.weight for lora in loras])
    return tiny.picture_of(pipeline, **arguments)

"""A denoiser's weights in one file: the bits of diffusers' `from_single_file`, whoever named the tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig
from safetensors.torch import save_file

from protocol.errors import BadRequest, ModelMissing
from protocol.job import JobRequest
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.stages import STAGES
from tests import tiny, tiny_families
from tests.stages import through
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.model_check import find_problems
from workers.models.source import locate
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage

gguf = pytest.importorskip("gguf")
ASKED: dict[str, Any] = {"prompt": "a red circle", "width": tiny.SIZE, "height": tiny.SIZE, "seed": 11}
Write = Callable[[dict[str, torch.Tensor], Path], Path]


def as_diffusers_names(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "own.safetensors")
    return folder / "own.safetensors"


RENAMED = {  # of Z-Image
    "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.", ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}  # fmt: skip


def as_its_makers_named_them(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write as Z-Image's makers did: query, key and value in one, and other names."""
    found: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if key.endswith(".attention.to_q.weight"):
            block = key.removesuffix("to_q.weight")
            found[f"{block}qkv.weight"] = torch.cat([weights[f"{block}to_{part}.weight"] for part in "qkv"])
        elif not key.endswith((".attention.to_k.weight", ".attention.to_v.weight")):
            for ours, theirs in RENAMED.items():
                key = key.replace(ours, theirs)
            found[f"model.diffusion_model.{key}"] = value
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "makers.safetensors")
    return folder / "makers.safetensors"


def as_gguf(weights: dict[str, torch.Tensor], folder: Path, kind: str = "Q8_0", architecture: str = "flux") -> Path:
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in weights.items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(key, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(key, array.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class Base:
    """A model's folder, and the weights of another denoiser of the same shapes."""

    folder: Path
    others: dict[str, torch.Tensor]


def made(pipeline: DiffusionPipeline, folder: Path) -> Base:
    torch.manual_seed(7)
    others = {key: torch.randn_like(value) * 0.1 for key, value in pipeline.transformer.state_dict().items()}
    return Base(tiny.save(pipeline, folder / "model"), others)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return made(tiny.flux(depth=2), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return made(tiny_families.z_image(), tmp_path_factory.mktemp("z_image"))


def as_fp8(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}, folder / "fp8.safetensors")
    return folder / "fp8.safetensors"


CASES = [("flux", as_diffusers_names), ("flux", as_fp8), ("z_image", as_its_makers_named_them), ("flux", as_gguf)]


def plain(base: Base, file: Path) -> torch.Tensor:
    gguf_only = {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32)}
    more = gguf_only if file.suffix == ".gguf" else {}
    given = DiffusionPipeline.from_pretrained(base.folder)
    transformer = type(given.transformer).from_single_file(
        str(file), config=str(base.folder), subfolder="transformer", dtype=torch.float32, **more
    )
    pipeline = DiffusionPipeline.from_pretrained(base.folder, transformer=transformer)
    return tiny.picture_of(pipeline, num_inference_steps=2, **ASKED)


@pytest.mark.parametrize(("family", "write"), CASES)
def test_a_file_gives_the_bits_of_from_single_file(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, write: Write
) -> None:
    base: Base = request.getfixturevalue(family)
    file = write(base.others, tmp_path)
    source = locate(ModelSpec(name=str(base.folder), transformer=str(file)), None)
    assert not find_problems(source, STAGES)
    assert source.revision.startswith(locate(ModelSpec(name=str(base.folder)), None).revision + "+")
    recipe = resolve(JobRequest(steps=2, **ASKED), describe(source), "float32", None)
    wanted = plain(base, file)
    assert torch.equal(through(source, recipe), wanted)
    assert not torch.equal(wanted, tiny.plain(base.folder, num_inference_steps=2, **ASKED))


@pytest.mark.parametrize(("family", "write"), CASES[2:])
def test_in_leases_mapped_weights_are_streamed_and_quantized_ones_are_in(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, write: Write
) -> None:
    base: Base = request.getfixturevalue(family)
    device = torch.device("cpu")
    source = locate(ModelSpec(name=str(base.folder), transformer=str(write(base.others, tmp_path))), None)
    recipe = resolve(JobRequest(steps=2, **ASKED), describe(source), "float32", None)
    text = TextStage(load(source, "text", Devices(device), torch.float32), device).run(recipe, (), unheard)
    loaded = load(source, "denoise", Devices(device, leased=True), torch.float32)
    stage = DenoiseStage(loaded, device)
    (residency,) = stage.residencies
    results = []
    for budget in (residency.total_bytes, max(residency.least_bytes, residency.total_bytes * 2 // 3)):
        residency.swap_in(budget)
        assert residency.device_bytes <= budget
        results.append([bytes(tensor.data) for tensor in stage.run(recipe, tuple(text.tensors), unheard).tensors])
        residency.swap_out()
    assert results[0] == results[1]


def without(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if part not in key}


def doubled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.cat([value, value]) for key, value in weights.items()}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda weights, folder: folder / "none.safetensors", "no file"),
        (lambda weights, folder: touched(folder / "a.ckpt"), "others hold programs"),
        (lambda weights, folder: touched(folder / "a.safetensors"), "no safetensors file, or is damaged"),
        (lambda weights, folder: touched(folder / "a.gguf"), "no GGUF file, or is damaged"),
        (lambda weights, folder: as_gguf(weights, folder, architecture="llama"), r"a language model \(llama\)"),
        (
            lambda weights, folder: as_diffusers_names(
                {k: v for k, v in weights.items() if "proj_mlp" not in k}, folder
            ),
            "is not for the transformer",
        ),
        (
            lambda weights, folder: as_diffusers_names(doubled(weights), folder),
            "has the shape",
        ),
        (
            lambda weights, folder: as_diffusers_names(dict(tiny.sd15().unet.state_dict()), folder),
            "is not for the transformer",
        ),
    ],
)
def test_what_is_no_file_for_the_denoiser_is_told(flux: Base, tmp_path: Path, make: Write, reason: str) -> None:
    assert re.search(reason, why_not(flux.folder, make(flux.others, tmp_path)))


def why_not(model: Path, file: Path) -> str:
    """Return why a file can't stand for a model's denoiser."""
    try:
        return "; ".join(
            map(str, find_problems(locate(ModelSpec(name=str(model), transformer=str(file)), None), STAGES))
        )
    except (ModelMissing, BadRequest) as error:
        return str(error)


def touched(path: Path) -> Path:
    path.write_bytes(b"no weights at all")
    return path

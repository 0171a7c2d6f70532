"""A whole model in one file, by its makers' names: the bits of diffusers' `from_single_file`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from protocol.errors import ModelMissing
from protocol.job import JobRequest
from protocol.model_spec import ModelSpec
from protocol.recipe import resolve
from protocol.stages import STAGES
from tests import tiny
from tests.originals import sd15_tensors, sdxl_tensors, write
from tests.stages import through
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.model_check import find_problems
from workers.models.single_file import base_of
from workers.models.source import locate
from workers.runtime.describer import examine
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage

ASKED: dict[str, Any] = {"prompt": "a red circle", "width": tiny.SIZE, "height": tiny.SIZE, "seed": 11}
MAKERS: dict[str, tuple[Callable[[], DiffusionPipeline], Callable[[Any], dict[str, torch.Tensor]]]] = {
    "sd15": (tiny.sd15, sd15_tensors),
    "sdxl": (lambda: tiny.sdxl(second=48), sdxl_tensors),
}


@dataclass(frozen=True)
class Trained:
    """A model's folder, another one's weights by the original names, and its pipeline class."""

    base: Path
    tensors: dict[str, torch.Tensor]
    cls: Any

    def plain(self, file: Path, dtype: torch.dtype = torch.float32, **parts: Any) -> torch.Tensor:
        pipeline = self.cls.from_single_file(str(file), config=str(self.base), dtype=dtype, **parts)
        return tiny.picture_of(pipeline, num_inference_steps=2, **ASKED)

    def ours(self, file: Path) -> torch.Tensor:
        source = locate(ModelSpec(name=str(file), base=str(self.base)), None)
        assert not find_problems(source, STAGES)
        return through(source, resolve(JobRequest(steps=2, **ASKED), describe(source), "float32", None))


@pytest.fixture(scope="module", params=MAKERS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    build, tensors = MAKERS[request.param]
    base = tiny.save(build(), tmp_path_factory.mktemp("base"))
    other: Any = build()
    torch.manual_seed(5)
    for part in other.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = torch.randn_like(parameter) * 0.1
    return Trained(base, tensors(other), type(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_gives_the_bits_of_from_single_file(trained: Trained, tmp_path: Path, dtype: torch.dtype) -> None:
    file = write(trained.tensors, tmp_path / "own.safetensors", dtype)
    picture = trained.plain(file)
    assert torch.equal(trained.ours(file), picture)
    assert not torch.equal(picture, tiny.plain(trained.base, num_inference_steps=2, **ASKED))


def test_what_a_file_lacks_is_its_bases(trained: Trained, tmp_path: Path) -> None:
    kept = {key: value for key, value in trained.tensors.items() if not key.startswith("first_stage_model.")}
    file = write(kept, tmp_path / "own.safetensors")
    vae = DiffusionPipeline.from_pretrained(trained.base).vae
    assert torch.equal(trained.ours(file), trained.plain(file, vae=vae))


def test_in_leases_its_weights_are_streamed(trained: Trained, tmp_path: Path) -> None:
    file, device = write(trained.tensors, tmp_path / "own.safetensors"), torch.device("cpu")
    source = locate(ModelSpec(name=str(file), base=str(trained.base)), None)
    recipe = resolve(JobRequest(steps=2, **ASKED), describe(source), "float32", None)
    text = TextStage(load(source, "text", Devices(device), torch.float32), device).run(recipe, (), unheard)
    stage = DenoiseStage(load(source, "denoise", Devices(device, leased=True), torch.float32), device)
    (residency,) = stage.residencies
    results = []
    for budget in (residency.total_bytes, max(residency.least_bytes, residency.total_bytes * 2 // 3)):
        residency.swap_in(budget)
        assert residency.device_bytes <= budget
        results.append([bytes(tensor.data) for tensor in stage.run(recipe, tuple(text.tensors), unheard).tensors])
        residency.swap_out()
    assert results[0] == results[1]


def test_the_base_is_found_by_the_tensors(tmp_path: Path) -> None:
    large = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)}
    assert base_of(write(large, tmp_path / "xl.safetensors")) == "stabilityai/stable-diffusion-xl-base-1.0"
    assert "stable-diffusion-v1-5" in base_of(write({"a": torch.zeros(1)}, tmp_path / "v1.safetensors"))


@pytest.mark.parametrize(
    ("name", "tensors", "says"),
    [
        ("own.ckpt", {"a": (1,)}, "others hold programs"),
        ("own.gguf", {"a": (1,)}, "holds a denoiser alone"),
        ("own.onnx", {"a": (1,)}, "is no model"),
        ("lora.safetensors", {"unet.down_blocks.0.lora_A.weight": (4, 4)}, "lacks"),
        ("llama.safetensors", {"model.layers.0.mlp.down_proj.weight": (4, 4)}, "lacks"),
    ],
)
def test_what_is_no_model_is_refused_in_a_line(
    tmp_path: Path, name: str, tensors: dict[str, tuple[int, ...]], says: str
) -> None:
    base = tiny.save(tiny.sd15(), tmp_path / "base")
    file = tmp_path / name
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, file)
    with pytest.raises(ModelMissing) as refused:
        examine(ModelSpec(name=str(file), base=str(base)), "float32")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_base_is_for_files_alone(tmp_path: Path) -> None:
    base = tiny.save(tiny.sd15(), tmp_path / "base")
    with pytest.raises(ModelMissing, match="needs no base"):
        locate(ModelSpec(name=str(base), base="demo"), None)
    file = write({"a": torch.zeros(1)}, tmp_path / "own.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelMissing, match="cut short"):
        locate(ModelSpec(name=str(file), base=str(base)), None)

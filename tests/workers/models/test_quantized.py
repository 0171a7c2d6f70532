"""Models whose weights were quantized before they were saved: torchao's are taken, others refused in a line."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, TorchAoConfig

from protocol.errors import ModelMissing
from protocol.job import JobRequest
from protocol.recipe import resolve
from tests import tiny
from tests.stacks import running_stack
from tests.stages import through
from workers.models.description import describe
from workers.models.model_check import check
from workers.models.source import quantization_method, read

torchao = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux whose denoiser torchao has quantized, as diffusers saves it."""
    where = tmp_path_factory.mktemp("quantized")
    plain = tiny.save(tiny.flux(), where / "plain")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    denoiser = FluxTransformer2DModel.from_pretrained(
        plain / "transformer", quantization_config=config, dtype=torch.bfloat16
    )
    pipeline = DiffusionPipeline.from_pretrained(plain, transformer=denoiser, dtype=torch.bfloat16)
    pipeline.save_pretrained(where / "int8")
    return where / "int8"


def test_pictures_of_a_quantized_checkpoint_equal_the_plain_pipelines(folder: Path) -> None:
    source = read(str(folder), folder, None)
    check(source)
    request = JobRequest(prompt="a red circle", width=tiny.SIZE, height=tiny.SIZE, steps=2, seed=11)
    ours = through(source, resolve(request, describe(source), "bfloat16", None), (), torch.bfloat16)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    made = pipeline(
        "a red circle", width=tiny.SIZE, height=tiny.SIZE, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    plain = torch.from_numpy((made.images * 255).round().astype("uint8"))
    assert torch.equal(ours.reshape(plain.shape), plain)


def test_what_a_quantized_checkpoint_lacks_is_told(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    broken = tiny.save(tiny.flux(), tmp_path / "broken")  # whose tensors are of fewer layers
    (broken / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    with pytest.raises(ModelMissing, match="lacks transformer_blocks"):
        check(read(str(broken), broken, None))


def test_other_quantized_checkpoints_are_refused_with_what_fits(tmp_path: Path) -> None:
    folder = tiny.save(tiny.flux(), tmp_path / "gptq")
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    source = read(str(folder), folder, None)
    assert quantization_method(source, "transformer") == "gptq"
    with pytest.raises(ModelMissing, match=r"quantized by gptq, which isn't taken.* GGUF"):
        check(source)


def test_a_stack_runs_a_quantized_checkpoint_though_its_fork_server_knows_no_torchao(folder: Path, state: Path) -> None:
    """Its denoise worker begins anew, as another program in the same process."""
    with running_stack(state, "--model", str(folder), "--device", "cpu", "--dtype", "bfloat16") as stack:
        size = {"width": tiny.SIZE, "height": tiny.SIZE, "steps": 2}
        job = stack.client.wait(stack.client.submit("a red circle", seed=11, **size).id, 60)
        made = stack.pictures(job.id)
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
        plain = pipeline(
            "a red circle", width=tiny.SIZE, height=tiny.SIZE, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(11),
        )  # fmt: skip
        assert torch.equal(made, torch.from_numpy((plain.images * 255).round().astype("uint8")))

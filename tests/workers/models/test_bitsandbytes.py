"""Checkpoints that bitsandbytes has quantized: plain diffusers' bits, with their weights in, out and streamed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, FluxTransformer2DModel
from transformers import BitsAndBytesConfig as TextConfig
from transformers import T5EncoderModel

from protocol.errors import ModelMissing
from protocol.job import JobRequest, Recipe
from protocol.pictures import pictures_among
from protocol.recipe import resolve
from protocol.stages import STAGES
from tests import tiny
from tests.stacks import running_stack
from tests.stages import through
from workers.models.bitsandbytes_weights import loaded_on_host
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.model_check import check
from workers.models.source import Source, read
from workers.profile.meta_run import MetaRun
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage

modules = pytest.importorskip("bitsandbytes.nn.modules")
pytestmark = pytest.mark.filterwarnings("ignore:inner dimension")  # of layers as narrow as these, on GPUs
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module", params=["nf4", pytest.param("fp4", marks=pytest.mark.all), "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Flux whose denoiser and T5 bitsandbytes has quantized, as diffusers saves it."""
    where: Path = tmp_path_factory.mktemp("quantized")
    plain = tiny.save(tiny.flux(depth=3), where / "plain")
    how = KINDS[request.param]
    with loaded_on_host():
        denoiser = FluxTransformer2DModel.from_pretrained(
            plain / "transformer", quantization_config=BitsAndBytesConfig(**how), dtype=torch.bfloat16
        )
        encoder = T5EncoderModel.from_pretrained(
            plain / "text_encoder_2", quantization_config=TextConfig(**how), dtype=torch.bfloat16
        )
        pipeline = DiffusionPipeline.from_pretrained(
            plain, transformer=denoiser, text_encoder_2=encoder, dtype=torch.bfloat16
        )
        pipeline.save_pretrained(where / "quantized")
    return where / "quantized"


def plainly(folder: Path, device: str) -> torch.Tensor:
    """The plain pipeline's picture; on a CPU where diffusers would want a GPU, but for where the weights are."""
    if device == "cpu":
        with loaded_on_host():
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a red circle", width=tiny.SIZE, height=tiny.SIZE, num_inference_steps=3, output_type="np",
        generator=torch.Generator().manual_seed(11),
    )  # fmt: skip
    return torch.from_numpy((made.images * 255).round().astype("uint8"))


def recipe_of(source: Source) -> Recipe:
    request = JobRequest(prompt="a red circle", width=tiny.SIZE, height=tiny.SIZE, steps=3, seed=11)
    return resolve(request, describe(source), "bfloat16", None)


@pytest.fixture(autouse=True)
def one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layout of weights that only CPUs have: bitsandbytes makes it in place, and fails where layers are narrow."""
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


def test_pictures_equal_the_plain_pipelines(folder: Path) -> None:
    source = read(str(folder), folder, None)
    check(source)
    ours = through(source, recipe_of(source), (), torch.bfloat16)
    plain = plainly(folder, "cpu")
    assert torch.equal(ours.reshape(plain.shape), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_come_and_go_and_pass_through_give_the_same_bits(folder: Path, device: str) -> None:
    source = read(str(folder), folder, None)
    recipe, where = recipe_of(source), torch.device(device)
    text, denoise, vae = (load(source, stage, Devices(where, leased=True), torch.bfloat16) for stage in STAGES)
    encode, stage, decode = TextStage(text, where), DenoiseStage(denoise, where), VaeStage(vae, where)
    for one in vae.residencies.values():
        one.swap_in(one.total_bytes)
    (residency,) = denoise.residencies.values()
    made = []
    for budget in (residency.total_bytes, residency.least_bytes, (residency.least_bytes + residency.total_bytes) // 2):
        for one in text.residencies.values():
            one.swap_in(one.total_bytes if budget == residency.total_bytes else one.least_bytes)
        residency.swap_in(budget)
        embeddings = tuple(encode.run(recipe, (), unheard).tensors)
        assert residency.state == ("in" if budget == residency.total_bytes else "streamed")
        latents = tuple(stage.run(recipe, embeddings, unheard).tensors)
        picture = pictures_among(decode.run(recipe, latents, unheard).tensors)
        made.append(torch.frombuffer(bytearray(picture.data), dtype=torch.uint8).reshape(picture.shape))
        for one in (residency, *text.residencies.values()):
            one.swap_out()
            assert one.device_bytes == 0
    plain = plainly(folder, device)
    assert all(torch.equal(one, plain) for one in made)


def test_what_a_checkpoint_lacks_is_told(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    broken = tiny.save(tiny.flux(), tmp_path / "broken")  # whose tensors are of fewer layers
    (broken / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    with pytest.raises(ModelMissing, match=r"lacks \w*transformer_blocks"):
        check(read(str(broken), broken, None))


def test_a_stack_runs_such_a_checkpoint_in_leases(folder: Path, state: Path) -> None:
    """Its workers begin anew, since the fork server knows no bitsandbytes; on a CPU that plays a GPU."""
    flags = ["--model", str(folder), "--device", "cpu:0", "--budget", "0=2MB", "--dtype", "bfloat16"]
    with running_stack(state, *flags) as stack:
        made = stack.picture("a red circle", width=tiny.SIZE, height=tiny.SIZE, steps=3, seed=11)[1]
    plain = plainly(folder, "cpu")
    assert torch.equal(made.reshape(plain.shape), plain)


def test_a_plan_counts_the_bytes_that_are_saved(folder: Path) -> None:
    source = read(str(folder), folder, None)
    _, denoise, _ = MetaRun(source, recipe_of(source)).stages()
    saved = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
    assert 0.5 * saved < denoise.weights <= saved  # beside headers, which tiny files are full of
    assert denoise.least < denoise.weights  # some of it can be streamed

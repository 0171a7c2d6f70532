"""LoRAs of a job: the bits of the plain pipeline with `load_lora_weights` and `set_adapters`, in any order of jobs."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from protocol.errors import DoesNotFit
from protocol.job import JobRequest, Recipe
from protocol.lora import Lora, LoraRequest
from protocol.pictures import pictures_among
from protocol.recipe import resolve
from protocol.stages import Stage
from tests import loras, tiny, tiny_families
from workers.errors import StageError
from workers.models import loras as loras_module
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.lora_files import LoraFiles
from workers.models.skeleton import build_skeleton
from workers.models.source import Source, read
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage

CPU = torch.device("cpu")
ASKED = {"prompt": "a red circle", "width": tiny.SIZE, "height": tiny.SIZE, "seed": 11}
ATTENTION, FEED_FORWARD = ("to_q", "to_k", "to_v"), ("net.2", "proj_mlp", "proj_out")
MODULATION = ("norm1.linear", "norm.linear", "norm1_context.linear")
FAMILIES: dict[str, tuple[Any, str, Sequence[str]]] = {
    "flux": (tiny.flux, "transformer", ATTENTION),
    "sd15": (tiny.sd15, "unet", ATTENTION),
    "sdxl": (tiny.sdxl, "unet", ATTENTION),
    "qwen_image": (tiny_families.qwen_image, "transformer", ATTENTION),
    "z_image": (tiny_families.z_image, "transformer", ATTENTION),
    "flux2_klein": (tiny_families.flux2_klein, "transformer", ("to_q", "to_out.0")),
}


@dataclass
class Stack:
    """Three stages that keep their models between jobs, in leases of a CPU that stands in for a GPU."""

    source: Source
    files: Path
    by_name: dict[Stage, Any]

    def recipe(self, used: Sequence[Lora], **more: Any) -> Recipe:
        request = JobRequest(**{**ASKED, "steps": 3, **more})
        return resolve(request, describe(self.source), "float32", None).model_copy(
            update={"loras": tuple(lora.model_copy(update={"encoders": True}) for lora in used)}
        )

    def picture(self, used: Sequence[Lora], **more: Any) -> torch.Tensor:
        recipe, left = self.recipe(used, **more), ()
        stage: Stage = "text"
        while True:
            outcome = self.by_name[stage].run(recipe, tuple(left), unheard)
            left = outcome.tensors
            if outcome.next is None:
                pictures = pictures_among(left)
                return torch.frombuffer(bytearray(pictures.data), dtype=torch.uint8).reshape(pictures.shape)
            stage = outcome.next

    def plain(self, used: Sequence[Lora], steps: int = 3) -> torch.Tensor:
        return loras.plain(self.source.folder, used, self.files, num_inference_steps=steps, **ASKED)


def stack(folder: Path, files: Path, share: float = 1.0) -> Stack:
    """Stages whose weights have so much of what they take; the rest is streamed."""
    source = read(str(folder), folder, None)
    by_name: dict[Stage, Any] = {}
    classes: dict[Stage, Any] = {"text": TextStage, "denoise": DenoiseStage, "vae": VaeStage}
    for name, cls in classes.items():
        loaded = load(source, name, Devices(CPU, leased=True), torch.float32)
        for residency in loaded.residencies.values():
            budget = int(share * residency.total_bytes) if name == "denoise" else residency.total_bytes
            residency.swap_in(max(budget, residency.least_bytes))
        assert loaded.loras
        loaded.loras.files.folder = files
        by_name[name] = cls(loaded, CPU)
    return Stack(source, files, by_name)


@pytest.fixture(
    scope="module", params=["flux", *(pytest.param(n, marks=pytest.mark.all) for n in FAMILIES if n != "flux")]
)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Sequence[str]]:
    make, component, layers = FAMILIES[request.param]
    return tiny.save(make(), tmp_path_factory.mktemp("families") / request.param), component, layers


def test_loras_give_the_plain_pipelines_bits_and_leave_none(
    family: tuple[Path, str, Sequence[str]], tmp_path: Path
) -> None:
    folder, component, layers = family
    pipeline = DiffusionPipeline.from_pretrained(folder)
    one = loras.write_lora(pipeline, tmp_path, "one", layers[:1], component)
    two = loras.write_lora(pipeline, tmp_path, "two", layers, component, rank=4).model_copy(update={"weight": 0.5})
    made = stack(folder, tmp_path)
    bare = made.plain([])
    assert torch.equal(made.picture([]), bare)
    for used in ([one], [one, two], [two, one], [], [two]):
        wanted = made.plain(used)
        assert torch.equal(made.picture(used), wanted)
        assert not used or not torch.equal(wanted, bare)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.flux(depth=3), tmp_path_factory.mktemp("deep") / "flux")


@pytest.mark.parametrize("share", [1.0, 0.8, 0.55])
def test_any_order_of_jobs_streamed_and_with_modulation_ahead(deep: Path, tmp_path: Path, share: float) -> None:
    pipeline = DiffusionPipeline.from_pretrained(deep)
    known = [
        loras.write_lora(pipeline, tmp_path, "attention", ATTENTION),
        loras.write_lora(pipeline, tmp_path, "modulation", MODULATION, rank=3),
        loras.write_lora(pipeline, tmp_path, "all", (*ATTENTION, *FEED_FORWARD, *MODULATION, "linear_1", "x_embedder")),
        loras.write_lora(pipeline, tmp_path, "text", ("q_proj", "v_proj"), "text_encoder"),
    ]
    made, draw = stack(deep, tmp_path, share), random.Random(5)
    wanted: dict[tuple[str, ...], torch.Tensor] = {}
    for turn in range(12):
        used = draw.sample(known, turn % 4)
        key = tuple(lora.name for lora in used)
        if key not in wanted:
            wanted[key] = made.plain(used)
        assert torch.equal(made.picture(used), wanted[key]), (turn, key)
        denoiser = made.by_name["denoise"].residencies[0]
        assert denoiser.device_bytes <= max(int(share * denoiser.total_bytes), denoiser.wanted_bytes)
        if turn == 7:
            denoiser.swap_out()
            denoiser.swap_in(int(share * denoiser.total_bytes))


@pytest.mark.parametrize("share", [1.0, 0.55])
def test_doras_have_the_plain_pipelines_bits_or_end_with_the_reason(deep: Path, tmp_path: Path, share: float) -> None:
    pipeline = DiffusionPipeline.from_pretrained(deep)
    one = loras.write_lora(pipeline, tmp_path, "one", ATTENTION, dora=True)
    other = loras.write_lora(pipeline, tmp_path, "other", ATTENTION, rank=4)
    made = stack(deep, tmp_path, share)
    (denoiser,) = made.by_name["denoise"].residencies
    if share == 1.0:
        denoiser.swap_in(denoiser.total_bytes + (1 << 20))
    for used in ([one], [other], [one, other], [], [one]):
        assert torch.equal(made.picture(used), made.plain(used))
    assert not torch.equal(made.plain([one]), made.plain([]))
    modulation = loras.write_lora(pipeline, tmp_path, "modulation", MODULATION, dora=True)
    if share == 1.0:
        assert torch.equal(made.picture([modulation]), made.plain([modulation]))
        return
    with pytest.raises(StageError, match="DoRA changes layers that are computed ahead"):
        made.picture([modulation])
    assert torch.equal(made.picture([other]), made.plain([other]))


def test_weights_stay_within_the_budget_with_adapters_among_them(deep: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(deep)
    known = [loras.write_lora(pipeline, tmp_path, name, ATTENTION, rank=8) for name in ("one", "two", "three")]
    made = stack(deep, tmp_path, 0.9)
    (denoiser,) = made.by_name["denoise"].residencies
    budget = int(0.9 * denoiser.total_bytes)
    for used in ([known[0]], [known[1], known[2]], [known[0]], []):
        made.picture(used)
        assert denoiser.device_bytes <= budget
    denoiser.swap_in(denoiser.wanted_bytes)
    assert denoiser.state == "in"
    assert torch.equal(made.picture(known), made.plain(known))
    assert denoiser.device_bytes <= denoiser.wanted_bytes


def test_adapters_that_find_no_room_end_the_job_and_change_nothing(deep: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(deep)
    made = stack(deep, tmp_path)
    (denoiser,) = made.by_name["denoise"].residencies
    small = loras.write_lora(pipeline, tmp_path, "small", ATTENTION[:1])
    large = loras.write_lora(pipeline, tmp_path, "large", (*ATTENTION, *FEED_FORWARD, *MODULATION), rank=64)
    wanted, tight = made.plain([small]), denoiser.total_bytes * 2 // 3
    for budget in (tight, denoiser.total_bytes):
        denoiser.swap_out()
        denoiser.swap_in(budget)
        assert torch.equal(made.picture([small]), wanted)
        assert denoiser.device_bytes <= budget
    denoiser.swap_out()
    denoiser.swap_in(tight)
    with pytest.raises(DoesNotFit, match="LoRAs take"):
        made.picture([large])
    assert torch.equal(made.picture([small]), wanted)
    denoiser.swap_out()
    denoiser.swap_in(denoiser.total_bytes // 2)  # less than jobs before had
    assert torch.equal(made.picture([]), made.plain([]))


def evil(folder: Path, files: Path) -> Iterator[tuple[Lora, str]]:
    """Files that would change more than adapters."""
    denoiser = DiffusionPipeline.from_pretrained(folder).transformer
    layer, inner = "transformer.single_transformer_blocks.0.attn.to_q", denoiser.inner_dim
    good = {f"{layer}.lora_A.weight": torch.ones(2, inner), f"{layer}.lora_B.weight": torch.ones(inner, 2)}

    def of(name: str, more: dict[str, torch.Tensor], **config: object) -> Lora:
        said = {f"transformer.{key}": value for key, value in {"r": 2, "lora_alpha": 2, **config}.items()}
        metadata = {"lora_adapter_metadata": json.dumps(said)} if config else None
        return loras.keep({**good, **more}, files, name, metadata=metadata)

    norm = denoiser.transformer_blocks[0].attn.norm_q.weight
    yield (
        of("norm", {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones_like(norm)}),
        "norms|model's own",
    )
    wide, out = 2 * denoiser.x_embedder.in_features, denoiser.x_embedder.out_features
    embedder = {"lora_A.weight": torch.ones(2, wide), "lora_B.weight": torch.ones(out, 2)}
    yield of("wide", {f"transformer.x_embedder.{key}": value for key, value in embedder.items()}), "other sizes"
    bias = torch.ones_like(denoiser.proj_out.bias)
    yield of("base", {"transformer.proj_out.bias": bias}), "weight of the model's own"
    for config in (
        {"modules_to_save": ["norm_out"]}, {"target_modules": "(a+)+"}, {"bias": "all"}, {"r": 10**9},
        {"layers_to_transform": [0]}, {"rank_pattern": {"x": 10**9}},
    ):  # fmt: skip
        yield of(next(iter(config)), {}, **config), f"asks for {next(iter(config))}"


def test_a_file_that_would_change_more_than_adapters_is_refused(deep: Path, tmp_path: Path) -> None:
    made = stack(deep, tmp_path)
    bare = made.plain([])
    own = made.by_name["denoise"].loaded.pipeline.transformer
    before = loras_module.parameters_of(own)
    for lora, reason in evil(deep, tmp_path):
        with pytest.raises(StageError, match=reason):
            made.picture([lora])
        assert loras_module.parameters_of(own) == before
        assert torch.equal(made.picture([]), bare)


def test_a_files_own_configuration_counts_but_for_what_training_heeds(deep: Path, tmp_path: Path) -> None:
    """Such as its alpha; dropout would draw random numbers in the plain pipeline, and is left out."""
    pipeline = DiffusionPipeline.from_pretrained(deep)
    said = {"r": 2, "lora_alpha": 7, "target_modules": list(ATTENTION), "lora_dropout": 0.0, "inference_mode": True}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})}
    scaled = loras.write_lora(pipeline, tmp_path, "scaled", ATTENTION, metadata=metadata)
    same = loras.write_lora(pipeline, tmp_path, "scaled", ATTENTION)
    made = stack(deep, tmp_path)
    picture = made.picture([scaled])
    assert torch.equal(picture, made.plain([scaled]))
    assert not torch.equal(picture, made.picture([same]))


def odd(folder: Path, files: Path) -> Iterator[tuple[Lora, str]]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    other = tiny.flux()
    other.transformer = type(other.transformer).from_config({**other.transformer.config, "num_attention_heads": 4})
    yield loras.write_lora(other, files, "wide", ATTENTION), "other sizes than those of this FluxPipeline"
    deeper = tiny.flux(depth=4)
    yield loras.write_lora(deeper, files, "deep", ATTENTION), "tensors for transformer have a place"
    yield loras.write_lora(tiny.sd15(), files, "unet", ATTENTION, "unet"), "for no part of a FluxPipeline"
    yield loras.keep({"nothing": torch.zeros(2, 2)}, files, "nothing"), "Invalid LoRA checkpoint"
    good = loras.write_lora(pipeline, files, "good", ("to_q",))
    (files / f"{good.digest}.safetensors").write_bytes(b"x" * 100)
    yield good, "has changed"
    yield Lora(name="gone", digest="0" * 64, weight=1.0), "not on this worker's host"


def test_what_is_no_lora_of_this_model_is_told_and_leaves_the_model_as_it_was(deep: Path, tmp_path: Path) -> None:
    made = stack(deep, tmp_path)
    bare = made.plain([])
    for lora, reason in odd(deep, tmp_path):
        with pytest.raises(StageError, match=reason):
            made.picture([lora])
        assert torch.equal(made.picture([]), bare)


def test_files_of_kohyas_trainer(tmp_path: Path) -> None:
    """By names of their own, with an alpha for each layer."""
    folder = tiny.save(tiny.sd15(), tmp_path / "model")
    pipeline, generator = DiffusionPipeline.from_pretrained(folder), torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for path, layer in pipeline.unet.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.endswith(("attn1.to_q", "attn2.to_k")):
            key = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=generator) * 0.3
            tensors[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=generator) * 0.3
            tensors[f"{key}.alpha"] = torch.tensor(1.5)
    lora = loras.keep(tensors, tmp_path / "kept", "kohya", metadata={"ss_base_model_version": "sd_v1"})
    made = stack(folder, tmp_path / "kept")
    wanted = made.plain([lora])
    assert torch.equal(made.picture([lora]), wanted)
    assert not torch.equal(wanted, made.plain([]))
    files = LoraFiles(lambda: build_skeleton(made.source), {}, [], tmp_path / "kept")
    found, info = files.find(LoraRequest(name="kohya", digest=lora.digest))
    assert info.components == ("unet",)
    assert (found.encoders, info.base) == (False, "sd_v1")

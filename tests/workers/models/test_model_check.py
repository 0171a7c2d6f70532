"""A model that isn't whole is refused from its headers alone; one that is, is run as plain diffusers runs it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionXLPipeline, WanImageToVideoPipeline, WanPipeline

from protocol.errors import ModelMissing
from protocol.job import JobRequest, Recipe
from protocol.model import ModelDescription
from protocol.recipe import resolve
from tests import tiny
from tests.workers import mutilation
from tests.workers.mutilation import Case
from workers.models.description import describe
from workers.models.devices import Devices
from workers.models.loading import load
from workers.models.model_check import check, find_problems
from workers.models.skeleton import pipeline_class, quiet, refusal
from workers.models.source import DEMO_FOLDER, Source, fingerprint, read
from workers.models.weight_files import Damaged, weight_files
from workers.runtime.describer import fits_together
from workers.stages.contract import unheard
from workers.stages.denoise import DenoiseStage
from workers.stages.text import TextStage
from workers.stages.vae import VaeStage

CPU = torch.device("cpu")
FILES = [*mutilation.files(DEMO_FOLDER)]
KEYS = [*mutilation.keys(DEMO_FOLDER)]
TENSORS = [*mutilation.tensors(DEMO_FOLDER)]
few = pytest.mark.parametrize("case", [*FILES[3::11], *KEYS[5::29], *TENSORS[7::61]], ids=str)


def described(folder: Path) -> tuple[Source, ModelDescription]:
    """As the describer looks at a model; ModelMissing."""
    with quiet():
        source = read("broken", folder, None)
        check(source)
        found = describe(source)
        fits_together(source, "float32", 64)
        return source, found


def pictures(source: Source, recipe: Recipe) -> torch.Tensor:
    """By the three stages; uint8 (n, height, width, 3)."""
    with quiet():
        text = TextStage(load(source, "text", Devices(CPU), torch.float32), CPU)
        denoise = DenoiseStage(load(source, "denoise", Devices(CPU), torch.float32), CPU)
        vae = VaeStage(load(source, "vae", Devices(CPU), torch.float32), CPU)
    tensors = tuple(text.run(recipe, (), unheard).tensors)
    tensors = tuple(denoise.run(recipe, tensors, unheard).tensors)
    (found,) = vae.run(recipe, tensors, unheard).tensors
    return torch.frombuffer(bytearray(found.data), dtype=torch.uint8).reshape(found.shape)


def plain(folder: Path, recipe: Recipe) -> torch.Tensor:
    """By the diffusers pipeline of that very folder."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        recipe.prompt, width=recipe.width, height=recipe.height, num_inference_steps=recipe.steps,
        max_sequence_length=recipe.max_sequence_length, generator=torch.Generator("cpu").manual_seed(recipe.seed),
        output_type="np",
    ).images  # fmt: skip
    return torch.from_numpy((images * 255).round().astype("uint8"))


def refused_or_as_plain(case: Case, folder: Path) -> None:
    broken = case.applied(DEMO_FOLDER, folder)
    try:
        source, model = described(broken)
    except ModelMissing:
        return
    request = JobRequest(prompt="a red circle", seed=1, width=64, height=64, steps=2, max_sequence_length=48)
    recipe = resolve(request, model, "float32", None)
    assert torch.equal(pictures(source, recipe), plain(broken, recipe))


@few
def test_a_broken_model_is_refused_or_run_as_plain_diffusers_runs_it(case: Case, tmp_path: Path) -> None:
    refused_or_as_plain(case, tmp_path)


@pytest.mark.all
@pytest.mark.parametrize("case", [*FILES, *KEYS], ids=str)
def test_every_file_and_key(case: Case, tmp_path: Path) -> None:
    refused_or_as_plain(case, tmp_path)


@pytest.mark.all
@pytest.mark.parametrize("case", TENSORS, ids=str)
def test_every_tensor_dropped_or_turned_is_named(case: Case, tmp_path: Path) -> None:
    source = read("broken", case.applied(DEMO_FOLDER, tmp_path), None)
    with quiet():
        (problem,) = find_problems(source)
    assert problem.file == case.file
    assert case.how.removeprefix("without ").removesuffix(" turned") in problem.fault or "more" in problem.fault


@pytest.mark.parametrize("name", [*mutilation.folders(DEMO_FOLDER)])
def test_a_component_that_is_gone_is_named(name: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / name)
    with pytest.raises(ModelMissing, match=f"{name}/ is missing"):
        described(tmp_path / "m")


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, folder := tmp_path / "m")
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    os.truncate(folder / "vae" / "diffusion_pytorch_model.safetensors", 50_000)
    (folder / "transformer" / "config.json").write_text("[]")
    with quiet():
        found = find_problems(read("m", folder, None))
    assert [problem.component for problem in found] == ["tokenizer_2", "transformer", "vae"]
    assert "vocabulary" in str(found[0])
    assert "holds no JSON object" in str(found[1])
    assert "cut short" in str(found[2])


def test_pipes_links_and_single_files_are_told_as_what_they_are(tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, folder := tmp_path / "m")
    config = folder / "vae" / "config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ModelMissing, match=r"vae/config.json is not a regular file"):
        read("m", folder, None)
    config.unlink()
    config.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelMissing, match=r"vae/config.json is a link to nothing"):
        read("m", folder, None)
    config.unlink()
    with pytest.raises(ModelMissing, match=r"A folder in it is: --model .*m"):
        read("m", tmp_path, None)


INDICES = (
    "[]",
    "{}",
    '{"_class_name": 3}',
    '{"_class_name": "FluxPipeline", "vae": ["a"]}',
    '{"_class_name": "FluxPipeline", "../x": ["diffusers", "AutoencoderKL"]}',
)


@pytest.mark.parametrize("text", INDICES)
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelMissing):
        described(tmp_path)


def test_a_variant_in_several_files_is_one_variant(tmp_path: Path) -> None:
    parts = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for part in parts:
        (tmp_path / part).touch()
    index = {"weight_map": {"a": parts[0], "b": parts[1]}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    found = weight_files(tmp_path, "transformers")
    assert (found.variant, [path.name for path in found.paths]) == ("fp16", parts)


def test_the_only_variant_is_taken_and_several_are_named(flux_dev: Path, tmp_path: Path) -> None:
    shutil.copytree(flux_dev, folder := tmp_path / "m")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    source, _ = described(folder)
    loaded = load(source, "vae", Devices(CPU), torch.float32)
    whole = load(read("m", flux_dev, None), "vae", Devices(CPU), torch.float32)
    for one, other in zip(loaded.pipeline.vae.parameters(), whole.pipeline.vae.parameters(), strict=True):
        assert torch.equal(one, other)
    shutil.copy(next((folder / "vae").glob("*.fp16.safetensors")),
                folder / "vae" / "diffusion_pytorch_model.ema.safetensors")  # fmt: skip
    with pytest.raises(Damaged, match="variants ema, fp16"):
        weight_files(folder / "vae", "diffusers")


def test_an_index_leads_to_no_file_outside(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(Damaged, match="outside of its folder"):
        weight_files(tmp_path, "transformers")


def test_what_loading_misses_is_an_error_there_too(tmp_path: Path) -> None:
    """The check is not what a worker relies on: files may change after it."""
    case = next(case for case in TENSORS if case.file.startswith("text_encoder_2") and case.how.startswith("without"))
    source = read("m", case.applied(DEMO_FOLDER, tmp_path), None)
    with pytest.raises(ModelMissing, match="lacks"), quiet():
        load(source, "text", Devices(CPU), torch.float32)


def test_a_fingerprint_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(Damaged, match="not a regular file"):
        fingerprint(tmp_path)


def every_pipeline() -> Iterator[type[DiffusionPipeline]]:
    for name in sorted(dir(diffusers)):
        found = getattr(diffusers, name, None)
        if isinstance(found, type) and issubclass(found, DiffusionPipeline) and found is not DiffusionPipeline:
            yield found


def test_every_pipeline_class_is_either_refused_in_a_line_or_can_be_asked_for_all_that_stages_need() -> None:
    taken = []
    for cls in every_pipeline():
        source = Source("m", Path("nowhere"), "r", cls.__name__, {})
        if why := refusal(cls):
            with pytest.raises(ModelMissing, match=r"is a \w+, which"):
                pipeline_class(source)
            assert "\n" not in why
            with pytest.raises(ModelMissing):
                check(source)
        else:
            taken.append(cls)
            assert pipeline_class(source) is cls
            with pytest.raises(ModelMissing):  # there is nothing in that folder
                describe(source)
            with pytest.raises(ModelMissing):
                check(source)
    assert {FluxPipeline, StableDiffusionXLPipeline} <= set(taken)
    assert {WanPipeline, WanImageToVideoPipeline} <= set(taken)
    assert len(taken) > 200


def test_what_can_not_be_built_is_a_line_and_no_crash(tmp_path: Path) -> None:
    folder = tiny.save(tiny.flux(), tmp_path)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": "many"}')
    with pytest.raises(ModelMissing, match="scheduler"):
        described(folder)

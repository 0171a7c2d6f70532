"""Where components go, decided from sizes alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from protocol.model_spec import ModelSpec
from protocol.stages import STAGES
from tests import tiny
from tests.stacks import triptych
from tests.tiny import needs_gpus
from workers.models import devices
from workers.models.description import describe
from workers.models.devices import Devices, choose
from workers.models.loading import files_as_they_are, files_of, load, weight_bytes
from workers.models.source import locate, read, stages_of
from workers.standalone import stage_file

GB = 10**9


@pytest.mark.parametrize(
    ("size", "room", "wanted"),
    [
        (5 * GB, {0: 16 * GB, 1: 16 * GB}, 0),
        (10 * GB, {0: 6 * GB, 1: 16 * GB}, 1),
        (24 * GB, {0: 16 * GB, 1: 16 * GB}, {0: 14 * GB, 1: 14 * GB}),
        (24 * GB, {0: 16 * GB}, None),
        (40 * GB, {0: 16 * GB, 1: 16 * GB}, None),
        (15 * GB, {0: 16 * GB}, None),
    ],
)
def test_one_gpu_if_one_holds_it_else_several_else_refused(size: int, room: dict[int, int], wanted: object) -> None:
    assert choose(size, room, workspace=2 * GB) == wanted


def test_weights_are_sized_from_headers_at_the_dtype_they_will_have(flux_dev: Path) -> None:
    source = read("x", flux_dev, None)
    full = weight_bytes(source, "transformer", torch.float32)
    assert full == 2 * weight_bytes(source, "transformer", torch.bfloat16)
    assert full < sum(p.stat().st_size for p in (flux_dev / "transformer").glob("*.safetensors")) < full + 100_000


def test_files_are_locked_ahead_that_need_no_cast_and_are_not_variants(flux_dev: Path, tmp_path: Path) -> None:
    shutil.copytree(flux_dev, folder := tmp_path / "flux")
    source = read("x", folder, None)
    wanted = [path for name in ("transformer", "vae") for path in (folder / name).glob("*.safetensors")]
    size = weight_bytes(source, "transformer", torch.float32)
    shutil.copy(wanted[0], wanted[0].with_suffix(".ema.safetensors"))
    assert sorted(files_as_they_are(source, ("transformer", "vae"), torch.float32)) == sorted(wanted)
    assert files_as_they_are(source, ("transformer", "vae"), torch.bfloat16) == []
    assert weight_bytes(source, "transformer", torch.float32) == size
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors", "c": "part-1.safetensors"}}
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    parts = [folder / "vae" / f"part-{n}.safetensors" for n in (1, 2)]
    for part in parts:
        shutil.copy(wanted[1], part)
    assert list(files_of(source, "vae").paths) == parts
    parts[1].write_bytes(b"torn")
    assert files_as_they_are(source, ("vae",), torch.float32) == parts[:1]


@needs_gpus(2)
def test_layers_spread_over_two_gpus_give_the_bits_of_one(flux_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read("x", flux_dev, None)
    size = weight_bytes(source, "transformer", torch.float32)
    monkeypatch.setitem(devices.WORKSPACE, "denoise", 0)
    cuda = torch.device("cuda:0")
    found = []
    for room in ({0: 2 * size}, {0: int(0.95 * size), 1: int(0.95 * size)}):
        loaded = load(source, "denoise", Devices(cuda, room, evenly=False), torch.float32)
        found.append(tiny.flux_forward(loaded.pipeline.transformer, "cuda:0").cpu())
    assert {where for _, where in loaded.device_map} == {"cuda:0", "cuda:1"}
    assert torch.equal(*found)


def test_components_belong_to_stages_by_their_names() -> None:
    assert stages_of("text_encoder_2") == stages_of("image_encoder") == ("text",)
    assert stages_of("transformer_2") == stages_of("unet") == stages_of("controlnet") == ("denoise",)
    assert stages_of("vae") == stages_of("safety_checker") == ("vae",)
    assert stages_of("tokenizer_2") == stages_of("scheduler") == STAGES


def test_lists_in_the_index_that_are_no_components_are_settings(flux_dev: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    shutil.copytree(flux_dev, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"layers": [9, 18, 27], "names": ["a", "b", "c"]}))
    assert set(read("x", folder, None).index) == set(read("y", flux_dev, None).index)


def test_the_demo_model_ships_and_says_what_it_takes() -> None:
    source = locate(ModelSpec(name="demo"), "text")
    model = describe(source)
    assert model.demo
    assert (model.width, model.height, model.size_multiple, model.max_sequence_length) == (128, 128, 16, 48)
    assert model.steps <= 12
    files = [path for path in source.folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.parent.name != "loras") <= 20_000_000
    small = {path.stem for path in files if path.parent.name == "loras" and path.stat().st_size <= 10**6}
    assert small == {"outline", "night"}


def hub_cache(home: Path, folder: Path) -> Path:
    """A Hugging Face cache that holds a model as 'tiny/flux', as a download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = home / "hub" / "models--tiny--flux"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    return snapshot


def test_a_hub_model_is_used_from_the_cache_with_its_commit_as_revision(
    flux_dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub_cache(tmp_path, flux_dev)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    run = (
        "worker",
        "text",
        "--standalone",
        "--model",
        "tiny/flux",
        "--device",
        "cpu",
        "--prompt",
        "a star",
        "-o",
        "e.st",
    )
    done = triptych(*run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe, _ = stage_file.read(tmp_path / "e.st", "denoise")
    assert (recipe.model, recipe.revision) == ("tiny/flux", snapshot.name)
    next((snapshot / "text_encoder_2").glob("*.safetensors")).unlink()
    missing = triptych(*run, cwd=tmp_path)
    assert missing.returncode == 4
    assert "text_encoder_2/ has no weights as safetensors" in missing.stderr
    unknown = triptych(*run[:4], "tiny/other", *run[5:], cwd=tmp_path)
    assert unknown.returncode == 4
    assert "not in the Hugging Face cache" in unknown.stderr

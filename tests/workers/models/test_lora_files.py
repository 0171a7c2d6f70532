"""A stack's answers about its LoRAs' files, and which of them it takes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from protocol.errors import BadRequest, ModelMissing, NotFound
from protocol.lora import LoraRequest
from tests import loras, tiny
from workers.models import lora_files
from workers.models.lora_files import LoraFiles, describe_lora
from workers.models.skeleton import build_skeleton
from workers.models.source import read

ATTENTION = ("to_q", "to_k")


def lora(path: Path, tensors: dict[str, torch.Tensor], **said: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, said or None)
    return path


DOWN, UP = torch.zeros(4, 2048), torch.zeros(8, 4)
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "said", "base", "rank", "triggers"),
    [
        ({f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}, {}, "SDXL", 4, ""),
        ({f"{KOHYA}.lora_down.weight": DOWN[:, :768].clone()}, {}, "Stable Diffusion 1", 4, ""),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": DOWN}, {}, "FLUX.1 or FLUX.2", 4, ""),
        ({"x.lora_A.weight": DOWN}, {"ss_base_model_version": "flux1", "trigger": "sks\n dog"}, "flux1", 4, "sks dog"),
        (
            {"x.lokr_w1": DOWN},
            {"ss_tag_frequency": json.dumps({"a": {"cat": 1, "dog ": 5}, "b": {"cat": 9}})},
            "", 0, "cat, dog",
        ),
        ({"x.lora_A.weight": DOWN}, {"ss_tag_frequency": "{no json"}, "", 4, ""),
    ],
)  # fmt: skip
def test_a_header_says_base_rank_and_words(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: dict[str, str], base: str, rank: int, triggers: str
) -> None:
    info = describe_lora("it", lora(tmp_path / "it.safetensors", tensors, **said))
    assert (info.base, info.rank, info.triggers) == (base, rank, triggers)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> LoraFiles:
    folder = tmp_path_factory.mktemp("files")
    model = tiny.save(tiny.flux(), folder / "model")
    written = loras.write_lora(tiny.flux(), folder / "w", "good", ATTENTION)
    (folder / "loras" / "below").mkdir(parents=True)
    (folder / "w" / f"{written.digest}.safetensors").rename(folder / "loras" / "below" / "good.safetensors")
    lora(folder / "loras" / "sdxl.safetensors", {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP})
    dora = {f"transformer.single_transformer_blocks.0.attn.to_q.{end}": size for end, size in (
        ("lora_A.weight", torch.zeros(2, 32)), ("lora_B.weight", torch.zeros(32, 2)), ("dora_scale", torch.zeros(32)),
    )}  # fmt: skip
    lora(folder / "loras" / "dora.safetensors", dora)
    lora(folder / "loras" / ".hidden.safetensors", {"x.lora_A.weight": DOWN})
    alias = {"short": str(folder / "loras" / "below" / "good.safetensors")}
    return LoraFiles(
        lambda: build_skeleton(read(str(model), model, None)),
        alias,
        [folder / "none", folder / "loras"],
        folder / "shelf",
    )


def test_a_lora_is_found_checked_and_put_on_the_shelf(files: LoraFiles) -> None:
    found, info = files.find(LoraRequest(name="good"))
    assert info.components == ("transformer",)
    assert not found.encoders
    same, _ = files.find(LoraRequest(name="short"))
    again, _ = files.find(LoraRequest(name="mine", digest=found.digest))
    assert found.digest == same.digest == again.digest
    assert {one.name for one in files.all()} == {"good", "short", "sdxl", "dora"}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (LoraRequest(name="sdxl"), "not for this model: .*; it is for SDXL"),
        (LoraRequest(name="dora"), "left out: .*DoRA|a weight of the model|a DoRA"),
        (LoraRequest(name="god"), "no LoRA 'god' in this stack. Did you mean 'good'"),
        (LoraRequest(name="mine", digest="0" * 64), "is not here"),
    ],
)
def test_others_are_refused_with_the_reason(files: LoraFiles, asked: LoraRequest, reason: str) -> None:
    with pytest.raises((BadRequest, NotFound), match=reason):
        files.find(asked)
    files.find(LoraRequest(name="good"))


def nothing() -> DiffusionPipeline:
    raise AssertionError


def test_aliases_are_files_or_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lora(tmp_path / "a.safetensors", {"x.lora_A.weight": DOWN})

    def of_hub(repo: str, name: str) -> str:
        if repo == "gone/away":
            raise LocalEntryNotFoundError("offline")
        return str(file)

    monkeypatch.setattr(lora_files, "hf_hub_download", of_hub)
    monkeypatch.setattr(lora_files, "list_repo_files", lambda repo: ["README.md", "one.safetensors"])
    found = LoraFiles(nothing, {"here": str(file), "there": "owner/name"}, [], tmp_path / "shelf")
    found.fetch()
    assert found.paths() == {"here": file, "there": file}
    for alias, where, reason in (
        ("x", "nothing.safetensors", "no file"),
        ("x", "gone/away:a.safetensors", "can't be reached"),
        ("a/b", str(file), "is no name"),
    ):
        with pytest.raises((ModelMissing, BadRequest), match=reason):
            LoraFiles(nothing, {alias: where}, [], tmp_path / "shelf").fetch()

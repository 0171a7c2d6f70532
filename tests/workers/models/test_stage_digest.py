"""Digests of text stages: equal where all that they compute with is, whatever lies beside it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from protocol.model_spec import ModelSpec
from protocol.worker_spec import DescriberSpec
from tests import tiny
from tests.families.case import awake
from tests.families.pictures import controlnet
from workers.models.description import describe
from workers.models.source import locate
from workers.models.stage_digest import stage_digest
from workers.runtime.describer import on_device


def digest(folder: Path, **parts: str) -> str:
    return stage_digest(locate(ModelSpec(name=str(folder), **parts), None), "text")


def test_what_is_beside_the_text_stage_changes_nothing(tmp_path: Path) -> None:
    model, other = tiny.save(tiny.sd15(), tmp_path / "model"), tmp_path / "other"
    shutil.copytree(model, other)
    save_file({"x": torch.zeros(1)}, tmp_path / "unet.safetensors")
    torch.manual_seed(0)
    awake(controlnet()).save_pretrained(tmp_path / "net")
    own = digest(model)
    assert len(own) == 16
    assert digest(other) == own
    assert digest(model, transformer=str(tmp_path / "unet.safetensors")) == own
    assert digest(model, controlnet=str(tmp_path / "net")) == own


def test_workers_are_shared_where_only_a_denoisers_weights_differ(tmp_path: Path) -> None:
    model, tuned, other = tiny.save(tiny.sd15(), tmp_path / "model"), tmp_path / "tuned", tmp_path / "other"
    for copy in (tuned, other):
        shutil.copytree(model, copy)
    (path,) = (tuned / "unet").glob("*.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    save_file({"x": torch.zeros(1)}, tmp_path / "unet.safetensors")
    own = workers_of(model)
    assert [stage for stage, _ in own] == ["text", "vae"]
    assert workers_of(tuned) == own
    assert workers_of(model, transformer=str(tmp_path / "unet.safetensors")) == own
    config = other / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"center_input_sample": True}))
    assert not {*workers_of(other)} & {*own}  # which the pipeline's code meets on its way
    assert digest(other) == digest(model)


def workers_of(folder: Path, **parts: str) -> tuple[tuple[str, str], ...]:
    return describe(locate(ModelSpec(name=str(folder), **parts), None)).worker_digests


def test_a_stage_on_another_device_is_another() -> None:
    spec = DescriberSpec(
        endpoint="", model=ModelSpec(name="m"), dtype="float32", stages=("text",), devices=(("text", "cpu"),)
    )  # fmt: skip
    other = spec.model_copy(update={"devices": (("text", "cuda"),)})
    assert len({"a", on_device("a", spec, "text"), on_device("a", other, "text"), on_device("a", spec, "vae")}) == 4
    assert on_device("", spec, "text") == ""


def test_a_tokenizer_a_setting_or_an_encoder_of_another_kind_changes_it(tmp_path: Path) -> None:
    model = tiny.save(tiny.sd15(), tmp_path / "model")
    own = digest(model)
    config = model / "text_encoder" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"layer_norm_eps": 1e-3}))
    assert digest(model) != own
    config.write_text(before)
    assert digest(model) == own
    (model / "text_encoder" / "model.safetensors").unlink()
    assert digest(model) == ""  # which may come later

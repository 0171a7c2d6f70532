"""A stack's LoRAs: aliases, a folder, and files of clients'; each picture has the plain pipeline's bits."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from orchestrator.access import KeyFolder
from protocol.client.client import Client
from protocol.client.lora_files import lora_file
from protocol.curve_keys import KeyPair, PeerKey, save
from protocol.errors import BadRequest, NotFound
from protocol.lora import Lora
from tests import loras, tiny
from tests.stacks import TRIPTYCH, RunningStack, running_stack, triptych
from tests.tiny import environment

SIZE = {"width": tiny.SIZE, "height": tiny.SIZE}
ASKED: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 3, **SIZE}
ATTENTION, MODULATION = ("to_q", "to_k", "to_v"), ("norm1.linear", "norm.linear")


class Shelf:
    """A model, and LoRAs for it under their names, beside what is none."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny.save(tiny.flux(depth=2), folder / "model")
        self.kept, self.folder = folder / "kept", folder / "loras"
        pipeline = DiffusionPipeline.from_pretrained(self.model)
        words = {"ss_base_model_version": "flux1", "ss_tag_frequency": json.dumps({"a": {"sks dog": 9, "dog": 2}})}
        self.known = {
            "attention": loras.write_lora(pipeline, self.kept, "attention", ATTENTION, metadata=words),
            "modulation": loras.write_lora(pipeline, self.kept, "modulation", MODULATION, rank=3),
            "text": loras.write_lora(pipeline, self.kept, "text", ("q_proj", "v_proj"), "text_encoder"),
            "mine": loras.write_lora(pipeline, self.kept, "mine", (*ATTENTION, *MODULATION), rank=4),
        }
        self.folder.mkdir()
        for name in ("attention", "modulation"):
            self.path(name).rename(self.folder / f"{name}.safetensors")
            (self.kept / f"{self.known[name].digest}.safetensors").symlink_to(self.folder / f"{name}.safetensors")
        loras.write_lora(tiny.sd15(), folder / "other", "unet", ATTENTION, "unet")
        next((folder / "other").iterdir()).rename(self.folder / "unet.safetensors")
        (self.folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
        self.config = folder / "triptych.toml"
        self.config.write_text(f'model = "{self.model}"\n[loras]\nwords = "{self.path("text")}"\n')

    def path(self, name: str) -> Path:
        return self.kept / f"{self.known[name].digest}.safetensors"

    def plain(self, used: list[Lora]) -> torch.Tensor:
        given = {key: value for key, value in ASKED.items() if key != "steps"}
        return loras.plain(self.model, used, self.kept, num_inference_steps=3, **given)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def stack(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    state = tmp_path_factory.mktemp("state") / "s"
    with running_stack(state, "--config", str(shelf.config), "--loras", str(shelf.folder)) as running:
        yield running


def test_loras_by_name_and_by_file_in_any_order(shelf: Shelf, stack: RunningStack) -> None:
    wanted: dict[tuple[str, ...], torch.Tensor] = {}
    draw = random.Random(2)
    texts = {"attention": "attention", "modulation": "modulation", "text": "words", "mine": str(shelf.path("mine"))}
    for turn in range(8):
        names = draw.sample(sorted(texts), turn % 4)
        used = [shelf.known[name].model_copy(update={"weight": 0.5 + index / 4}) for index, name in enumerate(names)]
        asked = [f"{texts[lora.name]}@{lora.weight}" for lora in used]
        key = tuple(names)
        if key not in wanted:
            wanted[key] = shelf.plain(used)
        job, pictures = stack.picture(**ASKED, loras=asked)
        assert torch.equal(pictures, wanted[key]), names
        assert [lora.digest for lora in job.recipe.loras] == [lora.digest for lora in used]


def test_prompts_are_encoded_anew_only_where_a_lora_changes_encoders(shelf: Shelf, stack: RunningStack) -> None:
    asked = {**ASKED, "prompt": "a blue star"}
    stack.picture(**asked)
    of_denoiser, _ = stack.picture(**asked, loras=["attention"])
    assert of_denoiser.records[0].cached
    of_encoder, _ = stack.picture(**asked, loras=["words"])
    assert not of_encoder.records[0].cached
    again, _ = stack.picture(**asked, loras=["words", "attention"])
    assert again.records[0].cached


def test_what_can_not_be_is_told_before_it_is_queued(shelf: Shelf, stack: RunningStack, tmp_path: Path) -> None:
    def refused(*texts: str) -> str:
        with pytest.raises((BadRequest, NotFound)) as caught:
            stack.client.submit(**ASKED, loras=list(texts))
        return str(caught.value)

    assert "no LoRA 'atention' in this stack. Did you mean 'attention'?" in refused("atention")
    assert "is not for this model: 3 of its" in (told := refused("unet")) or "for no part of a FluxPipeline" in told
    assert "is no safetensors file, or is damaged" in refused("broken")
    assert "which is no number" in refused("attention@loud")
    assert "It goes from -100 to 100" in refused("attention@1e9")
    assert "The same LoRA is given twice" in refused("attention", "attention@0.5")
    for name, what in (("a.ckpt", "no safetensors file"), ("a.bin", "other formats may hold programs")):
        (tmp_path / name).write_bytes(b"\x80\x04}q\x00.")
        assert what in refused(str(tmp_path / name))
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:
        file.truncate(3 << 30)
    assert "a LoRA has at most" in refused(str(huge))
    (tmp_path / "fake.safetensors").write_bytes(b"\x80\x04}q\x00." * 10)
    assert "no safetensors file, or is damaged" in refused(str(tmp_path / "fake.safetensors"))
    whole = shelf.model / "transformer" / "diffusion_pytorch_model.safetensors"
    assert "holds no adapter" in refused(str(whole))
    assert not stack.client.jobs(["failed"])


def test_the_command_line(shelf: Shelf, stack: RunningStack, tmp_path: Path) -> None:
    listed = triptych("loras", folder=stack.folder)
    assert listed.returncode == 0, listed.stderr
    assert "sks dog" in listed.stdout
    rows = json.loads(triptych("loras", "--json", folder=stack.folder).stdout)
    assert {row["name"]: row["rank"] for row in rows} == {"attention": 2, "modulation": 3, "unet": 2, "words": 2}
    output = tmp_path / "made.png"
    options = ["--steps", "3", "--seed", "3", "--size", f"{tiny.SIZE}x{tiny.SIZE}", "-o", str(output)]
    made = triptych("submit", ASKED["prompt"], "--lora", str(shelf.path("mine")), *options, folder=stack.folder)
    assert made.returncode == 0, made.stderr
    again = triptych("retry", str(output), "-o", str(tmp_path / "again.png"), folder=stack.folder)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").exists()
    job = triptych("jobs", "-q", "--limit", "1", folder=stack.folder).stdout.strip()
    newest = triptych("show", job, folder=stack.folder)
    assert f"@1 ({shelf.known['mine'].digest[:12]})" in newest.stdout, newest.stdout
    nowhere = triptych("up", "--loras", str(tmp_path / "nothing"), folder=tmp_path / "other")
    assert (nowhere.returncode, "There is no folder" in nowhere.stderr) == (4, True), nowhere.stderr
    wrong = triptych("submit", "x", "--lora", "nothing", folder=stack.folder)
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)


def test_a_file_is_sent_once_and_in_parts(shelf: Shelf, stack: RunningStack) -> None:
    file = lora_file(shelf.path("mine"))
    with Client(stack.folder) as client:
        client.send_lora(file)
        assert (stack.folder / "loras" / f"{file.digest}.safetensors").read_bytes() == file.path.read_bytes()
        client.send_lora(file)
    assert not list((stack.folder / "loras").glob("*.part"))


def test_stacks_whose_denoiser_is_changed_refuse_them(shelf: Shelf, state: Path) -> None:
    reason = "denoise is compiled, and takes no LoRAs"
    with (
        running_stack(state, "--config", str(shelf.config), "--compile", "--no-warm-up") as compiled,
        pytest.raises(BadRequest, match=reason),
    ):
        compiled.client.submit(**ASKED, loras=["words"])


def test_streamed_in_leases(shelf: Shelf, state: Path) -> None:
    """A CPU plays a GPU that can't hold the denoiser."""
    arguments = [
        "--config",
        str(shelf.config),
        "--loras",
        str(shelf.folder),
        "--device",
        "cpu:0",
        "--budget",
        "0=650KB",
    ]
    with running_stack(state, *arguments) as small:
        for names in (["attention"], [], ["modulation", "attention"], ["attention"]):
            used = [shelf.known[name] for name in names]
            assert torch.equal(small.picture(**ASKED, loras=names)[1], shelf.plain(used)), names


def test_a_worker_of_another_host_gets_the_files(shelf: Shelf, state: Path, tmp_path: Path) -> None:
    """One with a key, which reads nothing of the stack's folder."""
    pair = KeyPair.new()
    folder = KeyFolder(state / "keys")
    folder.server()
    folder.add("box", "worker", pair.public)
    named = ["--config", str(shelf.config), "--loras", str(shelf.folder), "--device", "cpu"]
    with running_stack(state, *named, "--workers", "denoise=0", "--listen-workers", "tcp://127.0.0.1:0") as running:
        endpoint = json.loads((state / "stack.json").read_text())["remote"]["worker"]
        save(tmp_path / "box.key", PeerKey("box", "worker", endpoint, folder.server().public, pair.public, pair.secret))
        arguments = ["--state", str(tmp_path / "box.key"), "--model", str(shelf.model), "--device", "cpu"]
        worker = subprocess.Popen(
            [*TRIPTYCH, "worker", "denoise", *arguments], env=environment(), stderr=subprocess.DEVNULL
        )
        try:
            for names in (["attention"], ["modulation", "attention"], []):
                used = [shelf.known[name] for name in names]
                assert torch.equal(running.picture(**ASKED, loras=names)[1], shelf.plain(used)), names
        finally:
            worker.terminate()
            assert worker.wait(20) == 0


@pytest.mark.all
def test_a_stage_alone_takes_files(shelf: Shelf, tmp_path: Path) -> None:
    made = {stage: str(tmp_path / f"{stage}.safetensors") for stage in ("text", "denoise")}
    model, file = ["--model", str(shelf.model), "--device", "cpu"], ["--lora", f"{shelf.path('mine')}@0.5"]
    asked = [
        "-p",
        ASKED["prompt"],
        "--seed",
        "3",
        "--steps",
        "3",
        "--width",
        str(tiny.SIZE),
        "--height",
        str(tiny.SIZE),
    ]
    for arguments in (
        ["text", *asked, *file, "-o", made["text"]],
        ["denoise", "-i", made["text"], *file, "-o", made["denoise"]],
        ["vae", "-i", made["denoise"], "-o", str(tmp_path / "out.png")],
    ):
        done = triptych("worker", *arguments, "--standalone", *model)
        assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    assert torch.equal(pixels, shelf.plain([shelf.known["mine"].model_copy(update={"weight": 0.5})])[0])
    without = triptych("worker", "denoise", "-i", made["text"], "--standalone", *model, "-o", made["denoise"])
    assert (without.returncode != 0, "is not on this worker's host" in without.stderr) == (True, True), without.stderr

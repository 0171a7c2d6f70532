"""Several models in one stack: in turns on one GPU, started when they are asked for, and resting."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from protocol.errors import BadRequest, Conflict, JobFailed, NotFound
from protocol.job import JobRequest
from tests import tiny
from tests.originals import sd15_tensors, write
from tests.stack.test_leases import weights
from tests.stack.test_stack import until
from tests.stacks import RunningStack, running_stack, triptych
from tests.tiny import plain

SIZE = {"width": 32, "height": 32, "steps": 3}
PLAIN = {"width": 32, "height": 32, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "flux": tiny.save(tiny.flux(depth=8), folder / "flux"),
        "sd": tiny.save(tiny.sd15(), folder / "sd"),
    }


@pytest.fixture
def two(state: Path, folders: dict[str, Path]) -> Iterator[RunningStack]:
    """A stack of both, without GPUs."""
    with running_stack(state, *named(folders), "--device", "cpu") as running:
        yield running


def named(folders: dict[str, Path]) -> list[str]:
    return [text for name, folder in folders.items() for text in ("--model", f"{name}={folder}")]


def resting(stack: RunningStack) -> dict[str, bool]:
    return {model.name: model.resting for model in stack.client.models()}


def names(stack: RunningStack) -> set[str]:
    return {worker.name for worker in stack.client.workers().workers}


@pytest.mark.parametrize("share", [0.7, pytest.param(1.2, marks=pytest.mark.all)])
def test_jobs_of_two_models_in_turns_are_equal_and_no_budget_is_passed(
    folders: dict[str, Path], state: Path, share: float
) -> None:
    jobs = [("flux" if number % 2 else "sd", f"a red circle {number}", number) for number in range(6)]
    wanted = [plain(folders[name], prompt=prompt, seed=seed, **PLAIN) for name, prompt, seed in jobs]
    with running_stack(
        state / "size", "--model", str(folders["flux"]), "--device", "cpu:0", "--budget", "0=1GB"
    ) as one:
        budget = int(weights(until(one, lambda w: all(worker.residency for worker in w.workers)), "denoise") * share)
    with running_stack(state / "two", *named(folders), "--device", "cpu:0", "--budget", f"0={budget}B") as stack:
        until(stack, lambda _: resting(stack) == {"flux": False, "sd": True})
        made = stack.client.submit_many(
            [JobRequest(model=name, prompt=prompt, seed=seed, **SIZE) for name, prompt, seed in jobs]
        )
        for job, picture in zip(made, wanted, strict=True):
            while stack.client.job(job.id).finished is None:
                assert sum(sum(worker.lease_bytes) for worker in stack.client.workers().workers) <= budget
            assert torch.equal(stack.pictures(job.id), picture)
        assert resting(stack) == {"flux": False, "sd": False}
        assert {job.recipe.model for job in made} == {str(folder) for folder in folders.values()}


@pytest.mark.all
def test_a_prompt_is_encoded_once_for_models_that_share_their_text_encoders(state: Path, tmp_path: Path) -> None:
    one, other = tiny.save(tiny.flux(), tmp_path / "one"), tmp_path / "other"
    shutil.copytree(one, other)
    shutil.rmtree(other / "transformer")
    tiny.flux(depth=3).transformer.save_pretrained(other / "transformer")
    with running_stack(state, "--model", f"one={one}", "--model", f"other={other}", "--device", "cpu") as stack:
        made = [
            stack.client.wait(stack.client.submit("a red circle", model=n, seed=3, **SIZE).id, 60)
            for n in ("one", "other")
        ]
        assert [job.cached for job in made] == [False, True]
        for job, folder in zip(made, (one, other), strict=True):
            assert torch.equal(stack.pictures(job.id), plain(folder, prompt="a red circle", seed=3, **PLAIN))


def test_what_models_share_is_in_leases_once(state: Path, tmp_path: Path) -> None:
    one, other = tiny.save(tiny.flux(depth=2), tmp_path / "one"), tmp_path / "other"
    shutil.copytree(one, other)
    weights_of(other / "transformer", seed=7)
    jobs = [("other" if number % 2 else "one", f"a red circle {number}", number) for number in range(6)]
    folders = {"one": one, "other": other}
    wanted = [plain(folders[name], prompt=prompt, seed=seed, **PLAIN) for name, prompt, seed in jobs]
    with running_stack(state, *named(folders), "--device", "cpu:0", "--budget", "0=1GB") as stack:
        stack.client.load_model("other")
        until(stack, lambda w: len({worker.name for worker in w.workers if worker.state == "idle"}) == 6)
        made = stack.client.submit_many(
            [JobRequest(model=name, prompt=prompt, seed=seed, **SIZE) for name, prompt, seed in jobs]
        )
        most: Counter[str] = Counter()
        for job, picture in zip(made, wanted, strict=True):
            while stack.client.job(job.id).finished is None:
                workers = stack.client.workers().workers
                most |= Counter(worker.stage for worker in workers if sum(worker.lease_bytes))
            assert torch.equal(stack.pictures(job.id), picture)
        assert most == {"text": 1, "denoise": 2, "vae": 1}  # room there would be for all


def weights_of(folder: Path, seed: int) -> None:
    """Give the weights in a folder other values."""
    (path,) = folder.glob("*.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    save_file({name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in tensors.items()}, path,
              {"format": "pt"})  # fmt: skip


def test_a_model_starts_when_it_is_asked_for_and_rests_when_told_to(
    two: RunningStack, folders: dict[str, Path]
) -> None:
    assert names(two) == {"flux-text-1", "flux-denoise-1", "flux-vae-1"}
    _, picture = two.picture("a star", model=str(folders["sd"]), seed=1, **SIZE)
    assert torch.equal(picture, plain(folders["sd"], prompt="a star", seed=1, **PLAIN))
    assert names(two) == {f"{model}-{stage}-1" for model in folders for stage in ("text", "denoise", "vae")}
    shown = triptych("models", "--json", folder=two.folder)
    assert [(m["name"], m["pipeline"], m["resting"]) for m in json.loads(shown.stdout)] == [
        ("flux", "FluxPipeline", False),
        ("sd", "StableDiffusionPipeline", False),
    ]
    assert triptych("models", "unload", "flux", folder=two.folder).returncode == 0
    until(two, lambda w: {worker.name.partition("-")[0] for worker in w.workers} == {"sd"})
    assert resting(two) == {"flux": True, "sd": False}
    two.client.scale("vae", 2, "flux")  # for when it is asked for
    assert triptych("models", "load", "flux", folder=two.folder).returncode == 0
    until(two, lambda w: sum(worker.name.startswith("flux-vae") for worker in w.workers) == 2)
    assert "flux" in triptych("models", folder=two.folder).stdout
    two.client.load_model("sd", load=False)
    _, picture = two.picture("a star", model="sd", seed=2, **SIZE)
    assert torch.equal(picture, plain(folders["sd"], prompt="a star", seed=2, **PLAIN))


@pytest.mark.all
def test_a_model_without_jobs_rests_after_a_while_and_comes_again(state: Path, folders: dict[str, Path]) -> None:
    config = state / "stack.toml"
    tables = [f'[models.{name}]\nmodel = "{folder}"\nrest_after = 0.2\n' for name, folder in folders.items()]
    config.write_text('model = "sd"\n' + "".join(tables))
    with running_stack(state / "s", "--config", str(config), "--device", "cpu") as stack:
        until(stack, lambda w: not w.workers)
        for name, folder in folders.items():
            _, picture = stack.picture("a star", model=None if name == "sd" else name, seed=3, **SIZE)
            assert torch.equal(picture, plain(folder, prompt="a star", seed=3, **PLAIN))


def test_what_is_wrong_with_a_models_name_or_its_jobs_is_said_at_once(two: RunningStack, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model 'sdxl' in this stack"):
        two.client.submit("a star", model="sdxl")
    with pytest.raises(BadRequest, match="takes no distilled guidance"):
        two.client.submit("a star", model="sd", guidance=3.0)
    refused = triptych("submit", "a star", "--model", "sdxl", folder=two.folder)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "flux, sd" in refused.stderr
    two.client.drain("vae")
    job = two.client.submit("a star", **SIZE)
    with pytest.raises(Conflict, match="flux has an unfinished job"):
        two.client.load_model("flux", load=False)
    two.client.cancel(job.id)
    two.client.drain("vae", on=False)
    with pytest.raises(NotFound, match="no model 'sdxl'"):
        two.client.load_model("sdxl")


@pytest.mark.all
def test_files_are_made_again_by_the_model_that_made_them(two: RunningStack, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a", "model": "sd", "seed": 1}\n{"prompt": "b", "seed": 2}\n')
    made = triptych("submit", "--prompts", str(prompts), "--size", "32x32", "--steps", "2", "-o", f"{tmp_path}/first/",
                    folder=two.folder)  # fmt: skip
    assert made.returncode == 0, made.stderr
    files = sorted(Path(path) for path in made.stdout.split())
    again = triptych("retry", *map(str, files), "-o", f"{tmp_path}/second/", folder=two.folder)
    assert again.returncode == 0, again.stderr
    assert len(files) == 2
    assert {job.recipe.model.rpartition("/")[2] for job in two.client.jobs()[:2]} == {"flux", "sd"}
    from PIL import Image

    first = sorted(Image.open(file).tobytes() for file in files)
    assert first == sorted(Image.open(file).tobytes() for file in (tmp_path / "second").iterdir())


@pytest.mark.all
def test_a_model_that_can_no_longer_be_loaded_costs_the_others_nothing(
    state: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders["sd"], tmp_path / "sd")
    file = next((broken / "unet").glob("*.safetensors"))
    with running_stack(state, *named({"flux": folders["flux"], "sd": broken}), "--device", "cpu") as stack:
        until(stack, lambda w: len(stack.client.models()) == 2)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        job = stack.client.submit("a star", model="sd", **SIZE)
        with pytest.raises(JobFailed, match=r"sd can't be run|files of sd have changed"):
            stack.client.wait(job.id, timeout=60)
        until(stack, lambda _: resting(stack) == {"flux": False, "sd": True})
        _, picture = stack.picture("a star", seed=1, **SIZE)
        assert torch.equal(picture, plain(folders["flux"], prompt="a star", seed=1, **PLAIN))
        file.write_bytes(whole)
        stack.client.retry(job.id)
        stack.client.wait(job.id, timeout=60)
        assert torch.equal(
            stack.pictures(job.id), plain(broken, prompt="a star", seed=stack.client.job(job.id).recipe.seed, **PLAIN)
        )


@pytest.mark.all
def test_a_file_is_a_model_beside_another(state: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    trained = tiny.sd15()
    for parameter in trained.unet.parameters():
        parameter.data = parameter.data * 1.1
    file = write(sd15_tensors(trained), tmp_path / "own.safetensors")
    config = tmp_path / "stack.toml"
    tables = f'[models.flux]\nmodel = "{folders["flux"]}"\n[models.own]\nmodel = "{file}"\nbase = "{folders["sd"]}"\n'
    config.write_text(tables)
    with running_stack(state, "--config", str(config), "--device", "cpu") as stack:
        _, picture = stack.picture("a star", model="own", seed=1, **SIZE)
        wanted = StableDiffusionPipeline.from_single_file(str(file), config=str(folders["sd"]), dtype=torch.float32)
        assert torch.equal(picture, tiny.picture_of(wanted, prompt="a star", seed=1, **PLAIN))


def test_models_come_to_a_running_stack_and_go(state: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    with running_stack(state, "--model", str(folders["flux"]), "--device", "cpu") as stack:
        added = triptych("models", "add", f"sd={folders['sd'].name}", folder=stack.folder, cwd=folders["sd"].parent)
        assert added.returncode == 0, added.stderr
        until(stack, lambda _: resting(stack) == {"flux": False, "sd": True})
        assert triptych("models", "add", f"sd={folders['sd']}", folder=stack.folder).returncode == 0  # the very same
        _, picture = stack.picture("a star", model="sd", seed=1, **SIZE)
        assert torch.equal(picture, plain(folders["sd"], prompt="a star", seed=1, **PLAIN))
        assert names(stack) == {"text-1", "denoise-1", "vae-1", "sd-text-1", "sd-denoise-1", "sd-vae-1"}
        taken = triptych("models", "add", f"sd={folders['flux']}", folder=stack.folder)
        assert "another model 'sd'" in taken.stderr
        missing = triptych("models", "add", "no=/nowhere", folder=stack.folder)
        assert (missing.returncode, missing.stderr.count("\n")) == (4, 2), missing.stderr
        broken = shutil.copytree(folders["sd"], tmp_path / "broken")
        file = next((broken / "unet").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-100])
        refused = triptych("models", "add", str(broken), folder=stack.folder)
        assert (refused.returncode, "cut short" in refused.stderr) == (4, True), refused.stderr
        assert sorted(resting(stack)) == ["flux", "sd"]
        os.kill(stack.client.stack().pid, signal.SIGKILL)
        until(stack, lambda _: sorted(resting(stack)) == ["flux", "sd"])  # another one knows of it, too
        assert triptych("models", "remove", "flux", folder=stack.folder).returncode == 2
        assert triptych("models", "remove", "sd", folder=stack.folder).returncode == 0
        until(stack, lambda w: {worker.name for worker in w.workers} == {"text-1", "denoise-1", "vae-1"})
        assert sorted(resting(stack)) == ["flux"]
        with pytest.raises(NotFound):
            stack.client.submit("a star", model="sd")
        _, picture = stack.picture("a star", seed=1, **SIZE)
        assert torch.equal(picture, plain(folders["flux"], prompt="a star", seed=1, **PLAIN))


@pytest.mark.all
def test_a_default_model_that_rests_and_is_lost_costs_the_others_nothing(
    state: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    broken = shutil.copytree(folders["sd"], tmp_path / "sd")
    file = next((broken / "unet").glob("*.safetensors"))
    with running_stack(state, *named({"sd": broken, "flux": folders["flux"]}), "--device", "cpu") as stack:
        stack.picture("a star", **SIZE)  # so that it is known to work
        stack.client.load_model("sd", load=False)
        until(stack, lambda w: not w.workers)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        job = stack.client.submit("another star", **SIZE)
        with pytest.raises(JobFailed, match=r"sd can't be run|files of sd have changed"):
            stack.client.wait(job.id, timeout=60)
        until(stack, lambda _: bool({model.name: model.reason for model in stack.client.models()}["sd"]))
        _, picture = stack.picture("a star", model="flux", seed=1, **SIZE)
        assert torch.equal(picture, plain(folders["flux"], prompt="a star", seed=1, **PLAIN))


@pytest.mark.all
def test_a_model_whose_files_change_while_it_rests_is_looked_at_anew(
    state: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sd"], tmp_path / "sd")
    with running_stack(state, *named({"flux": folders["flux"], "sd": folder}), "--device", "cpu") as stack:
        until(stack, lambda w: len(stack.client.models()) == 2)
        before = {model.name: model.revision for model in stack.client.models()}["sd"]
        trained = tiny.sd15()
        for parameter in trained.unet.parameters():
            parameter.data = parameter.data * 1.1
        tiny.save(trained, folder)
        job = stack.client.submit("a star", model="sd", **SIZE)
        with pytest.raises(JobFailed, match="files of sd have changed"):
            stack.client.wait(job.id, timeout=60)
        until(stack, lambda w: {m.name: m.revision for m in stack.client.models()}["sd"] != before)
        _, picture = stack.picture("a star", model="sd", seed=1, **SIZE)
        assert torch.equal(picture, plain(folder, prompt="a star", seed=1, **PLAIN))

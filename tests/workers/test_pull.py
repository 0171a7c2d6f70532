"""Models from the hub, which a server of this machine plays: only what is needed, and what was cut off goes on."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.hub import COMMIT, FakeHub, fake_hub
from tests.stacks import TRIPTYCH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tiny.flux(), tmp_path_factory.mktemp("hub"))
    (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x" * 1000)
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"x" * 1000)
    (folder / "sample.png").write_bytes(b"x")
    return folder


def pull(hub: FakeHub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = tiny.environment() | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
    return subprocess.run(
        [*TRIPTYCH, "pull", *arguments], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def there(home: Path) -> set[str]:
    folder = home / "hub" / "models--tiny--model" / "snapshots" / COMMIT
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_stages_need_is_downloaded_once(model: Path, tmp_path: Path) -> None:
    with fake_hub(FakeHub(model)) as hub:
        first = pull(hub, tmp_path, "tiny/model", "--stage", "vae")
        assert first.returncode == 0, first.stderr
        assert Path(first.stdout.strip()).name == COMMIT
        weights = {file for file in there(tmp_path) if file.endswith(".safetensors")}
        assert weights == {"vae/diffusion_pytorch_model.safetensors"}
        second = pull(hub, tmp_path, "tiny/model")
        assert second.returncode == 0, second.stderr
        wanted = {str(f.relative_to(model)) for f in model.rglob("*") if f.is_file()}
        assert there(tmp_path) == {f for f in wanted if not f.endswith((".fp16.safetensors", ".bin", ".png"))}
        assert len(hub.asked) == len({file for file, _ in hub.asked})
        done = len(hub.asked)
        assert pull(hub, tmp_path, "tiny/model").returncode == 0
        assert len(hub.asked) == done


def test_a_download_that_was_cut_off_goes_on(model: Path, tmp_path: Path) -> None:
    folder, name = shutil.copytree(model, tmp_path / "model"), "vae/diffusion_pytorch_model.safetensors"
    save_file({"large": torch.rand(24 << 18)}, folder / name)  # of several of the library's pieces of 10 MB
    with fake_hub(FakeHub(folder, cut={name: 22 << 20})) as hub:
        for _ in range(2):  # the library itself tries again, or a person does
            if (found := pull(hub, tmp_path, "tiny/model", "--stage", "vae")).returncode == 0:
                break
        assert found.returncode == 0, found.stderr
        assert [range_ != "" for file, range_ in hub.asked if file == name] == [False, True]
    copy = next((tmp_path / "hub").rglob(f"snapshots/*/{name}"))
    assert copy.read_bytes() == (folder / name).read_bytes()


def test_what_cannot_be_had_is_said_in_a_line(model: Path, tmp_path: Path) -> None:
    with fake_hub(FakeHub(model)) as hub:
        for arguments, code, says in (
            (["tiny/nothing"], 4, "no model 'tiny/nothing'"), (["demo"], 2, "ships with Triptych"),
            ([str(model)], 2, "is a folder here"), (["not a model"], 4, "There is no model"),
        ):  # fmt: skip
            refused = pull(hub, tmp_path, *arguments)
            assert (refused.returncode, refused.stdout) == (code, ""), refused.stderr
            assert says in refused.stderr
            assert "Traceback" not in refused.stderr
        hub.gated = True
        gated = pull(hub, tmp_path, "tiny/model")
        assert gated.returncode == 4
        assert "is gated, and this account has no access" in gated.stderr
        hub.gated = False
        hub.sizes["transformer/diffusion_pytorch_model.safetensors"] = 10**18
        full = pull(hub, tmp_path, "tiny/model")
        assert full.returncode == 4
        assert "takes 1000000000.0 GB more; the disk of" in full.stderr
        assert not any(file.endswith(".safetensors") for file, _ in hub.asked if file.startswith("transformer"))

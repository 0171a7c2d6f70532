"""The findings of `triptych doctor` before a stack is started."""

from pathlib import Path

from orchestrator.cli.doctor import beside_memory

GB = 10**9


def test_weights_that_memory_does_not_hold_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.fp16.safetensors"):
        with open(tmp_path / "transformer" / name, "wb") as file:
            file.truncate(12 * GB)  # which takes no room
    assert beside_memory(tmp_path, 64 * GB) == []
    (finding,) = beside_memory(tmp_path, 24 * GB)
    assert finding.good
    assert finding.mark == "--"
    assert finding.text.startswith("24.0 GB of weights don't all stay in 24.0 GB")

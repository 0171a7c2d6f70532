"""Which logs a name stands for."""

from pathlib import Path

import pytest

from orchestrator.cli.logs import logs_of, names_in

FILES = ("text-1.log", "flux-text-1.log", "text-1@box.lan.log", "http.log", "orchestrator.log", "door-worker.log")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("text", {"text-1.log", "flux-text-1.log", "text-1@box.lan.log"}),
        ("box.lan", {"text-1@box.lan.log"}),
        ("http", {"http.log"}),
        ("door", {"door-worker.log"}),
        ("text-1", {"text-1.log"}),
        ("denoise", set()),
        (None, set(FILES)),
    ],
)
def test_a_log_is_found_by_stage_process_or_host(tmp_path: Path, name: str | None, found: set[str]) -> None:
    for file in FILES:
        (tmp_path / file).touch()
    assert {path.name for path in logs_of(tmp_path, name)} == found


def test_the_names_that_there_are_can_be_told(tmp_path: Path) -> None:
    for file in FILES:
        (tmp_path / file).touch()
    assert names_in(tmp_path) == ["box.lan", "door", "flux", "http", "orchestrator", "text", "worker"]

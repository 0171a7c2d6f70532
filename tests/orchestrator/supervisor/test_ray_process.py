"""What keeps a stack from a Ray cluster is said in a line, before anything is started."""

import socket
from pathlib import Path

import pytest

from orchestrator.access import KeyFolder
from orchestrator.settings import StackConfig
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor import ray_process
from orchestrator.supervisor.ray_process import ready_for_ray, same_port
from protocol.errors import BadRequest

pytest.importorskip("ray")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StackFolder:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    monkeypatch.setattr(ray_process, "RAY_STATUS", ("false",))  # a cluster that refuses who has no token
    found = StackFolder(tmp_path / "state")
    found.create()
    return found


def test_a_cluster_must_ask_for_a_token(folder: StackFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(BadRequest, match="lets everybody in"):
        ready_for_ray(StackConfig(ray="auto"), folder)


def test_a_cluster_that_was_started_without_a_token_is_refused(
    folder: StackFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "RAY_STATUS", ("sh", "-c", 'test "$RAY_AUTH_MODE$RAY_AUTH_TOKEN" = disabled'))
    with pytest.raises(BadRequest, match="was started without a token"):
        ready_for_ray(StackConfig(ray="auto"), folder)


def test_a_token_that_others_can_read_is_none(
    folder: StackFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("t" * 64)
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(BadRequest, match="Others can read"):
        ready_for_ray(StackConfig(ray="auto"), folder)
    token.chmod(0o600)
    assert ready_for_ray(StackConfig(ray="auto"), folder).listen_workers


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:99999999"])
def test_an_address_where_nothing_answers_is_named(folder: StackFolder, address: str) -> None:
    with pytest.raises(BadRequest, match=f"No Ray cluster answers at '{address}'"):
        ready_for_ray(StackConfig(ray=address), folder)


def test_hosts_must_find_the_stack(folder: StackFolder) -> None:
    with pytest.raises(BadRequest, match="no other host finds it"):
        ready_for_ray(StackConfig(ray="auto", listen_workers="tcp://127.0.0.1:5556"), folder)
    config = ready_for_ray(StackConfig(ray="auto"), folder)
    assert config.listen_workers == "tcp://0.0.0.0:0"
    assert KeyFolder(folder.keys).exists  # so that whoever comes needs a key


def test_a_stack_that_was_killed_comes_back_at_its_port_if_that_is_free(folder: StackFolder) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (folder.path / "stack.json").write_text(f'{{"remote": {{"worker": "tcp://0.0.0.0:{port}"}}}}')
        assert same_port(folder) == "tcp://0.0.0.0:0"
    assert same_port(folder) == f"tcp://0.0.0.0:{port}"
    (folder.path / "stack.json").write_text("{}")
    assert same_port(folder) == "tcp://0.0.0.0:0"

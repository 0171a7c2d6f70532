"""What ranks tell each other at a job's end."""

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from workers import ranks
from workers.ranks import DONE, GO, STOP, take_part


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


def failing(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_rank_that_fails_alone_ends_and_one_that_fails_with_the_first_goes_on(
    link: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = link
    stage = SimpleNamespace(run=failing, device=torch.device("cpu"))
    monkeypatch.setattr(ranks, "FAIL_SECONDS", 0.05)
    with pytest.raises(torch.OutOfMemoryError):
        take_part(stage, None, (), far)
    near.sendall(GO + GO + STOP)
    take_part(stage, None, (), far)
    assert near.recv(1) == DONE

"""The supervisor as the orchestrator knows it."""

import pytest

from orchestrator.dispatch.outbox import Outbox
from orchestrator.server.supervisor_link import SupervisorLink
from protocol.errors import NotFound
from protocol.messages.supervisor import KillProcess, RestartProcess, SetScale


def told(outbox: Outbox) -> list[object]:
    return [letter.message for letter in outbox.drain()]


def test_without_a_supervisor_it_is_said_and_nothing_is_sent() -> None:
    outbox = Outbox()
    link = SupervisorLink(outbox)
    with pytest.raises(NotFound, match="without a supervisor"):
        link.check("text")
    link.kill(1, "why")
    assert not link.restart("text-1")
    assert told(outbox) == []
    assert link.hello(b"s")
    assert not link.hello(b"s")  # a sign of life of the same one
    link.check("text")
    link.scale("m", "text", 2)
    link.kill(1, "why")
    assert link.restart("text-1")
    said = [SetScale(model="m", stage="text", count=2), KillProcess(pid=1, reason="why")]
    assert told(outbox) == [*said, RestartProcess(name="text-1")]
    link.gone()
    assert not link.is_here(b"s")
    assert link.hello(b"s2")

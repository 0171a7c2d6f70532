"""A busy orchestrator is told from one that is stuck: only the latter is ended."""

import time
from typing import Any

import pytest

from orchestrator.supervisor.supervisor import DEAF_SECONDS, Supervisor


class Children:
    """The orchestrator alone, whose loop has stood still for so many seconds."""

    def __init__(self, still: float) -> None:
        self.orchestrator = self
        self.pulse, self.http, self.ray = self, None, None
        self.state = "running"
        self.ended: list[str] = []
        self._still = still

    def __iter__(self) -> Any:
        return iter([self])

    def still_for(self) -> float:
        return self._still

    def put_down_stopped(self) -> list[int]:
        return []

    def put_down(self, verdict: str) -> None:
        self.ended.append(verdict)


@pytest.mark.parametrize(("still", "ended"), [(0.1, 0), (DEAF_SECONDS + 1, 1)])
def test_an_orchestrator_that_gives_no_answer_is_ended_only_if_its_loop_stands_still(still: float, ended: int) -> None:
    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._children = children = Children(still)
    supervisor._keeper = children
    supervisor._looked = time.monotonic()
    supervisor._answered = time.monotonic() - DEAF_SECONDS - 1
    supervisor._end_the_hung()
    assert len(children.ended) == ended

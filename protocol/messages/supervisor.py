"""Messages between the supervisor and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.messages.common import Beat, Count, Error, Line, Message, Name
from protocol.stages import Stage
from protocol.views import ProcessView


class SupervisorHello(Message):
    kind = "supervisor-hello"
    pid: Count


class Processes(Message):
    """All processes that the supervisor keeps, whenever one changes."""

    kind = "processes"
    processes: Annotated[tuple[ProcessView, ...], Field(max_length=4096)]
    exited_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    stopped_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()  # of them, which no task can have ended


class SetScale(Message):
    kind = "set-scale"
    stage: Stage
    count: Annotated[int, Field(ge=0, le=1024)]


class RestartProcess(Message):
    """End a worker's process in good order, and start another."""

    kind = "restart-process"
    name: Name


class KillProcess(Message):
    """A process has shown no sign of life, or of progress: it is to be ended, and another started."""

    kind = "kill-process"
    pid: Count
    reason: Line


FROM_SUPERVISOR: tuple[type[Message], ...] = (SupervisorHello, Processes)
TO_SUPERVISOR: tuple[type[Message], ...] = (SetScale, RestartProcess, KillProcess, Beat, Error)

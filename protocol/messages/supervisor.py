"""Messages between the supervisor and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.data import Data
from protocol.messages.common import MOST_MODELS, Beat, Count, Error, Line, Message, Name
from protocol.stages import Stage
from protocol.views import ProcessView


class SupervisorHello(Message):
    kind = "supervisor-hello"
    pid: Count


class RestingModel(Data):
    """A model that has no workers for now."""

    name: str  # in the stack
    reason: str = ""  # why they could not be started, when they were last asked for


class Processes(Message):
    """All processes that the supervisor keeps, whenever one changes."""

    kind = "processes"
    processes: Annotated[tuple[ProcessView, ...], Field(max_length=4096)]
    exited_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()
    stopped_pids: Annotated[tuple[Count, ...], Field(max_length=4096)] = ()  # of them, which no task can have ended
    resting: Annotated[tuple[RestingModel, ...], Field(max_length=MOST_MODELS)] = ()


class SetScale(Message):
    kind = "set-scale"
    model: str  # by its name in the stack
    stage: Stage
    count: Annotated[int, Field(ge=0, le=1024)]


class WakeModel(Message):
    """Start the workers of a model; or, with `rest`, end them until it is asked for again."""

    kind = "wake-model"
    model: str
    rest: bool = False


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
TO_SUPERVISOR: tuple[type[Message], ...] = (SetScale, WakeModel, RestartProcess, KillProcess, Beat, Error)

"""Messages between the supervisor and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.data import Data, Text
from protocol.host import HostFacts
from protocol.messages.common import MOST_MODELS, Beat, Count, Error, Line, Message, Name, ProcessName
from protocol.model_spec import ModelSpec
from protocol.stages import Stage
from protocol.views import ProcessView
from protocol.worker_spec import WorkerSpec


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


class AddModel(Message):
    """Plan for another model, and start its describer; the answer is ModelAdded."""

    kind = "add-model"
    model: str  # by which jobs are to name it
    spec: ModelSpec


class ModelAdded(Message):
    """A model is there, or why it can't be."""

    kind = "model-added"
    model: str  # by its name in the stack
    settings: Text = ""  # JSON of the orchestrator's ModelSettings; empty: it is not there
    lost: bool = False  # it was there, and can't be used after all
    code: Name = "error"  # of the error
    reason: Line = ""
    hint: Line = ""


class RemoveModel(Message):
    """End all processes of a model, and forget it."""

    kind = "remove-model"
    model: str


class RestartProcess(Message):
    """End a worker's process in good order, and start another."""

    kind = "restart-process"
    name: ProcessName


class KillProcess(Message):
    """A process has shown no sign of life, or of progress: it is to be ended, and another started."""

    kind = "kill-process"
    pid: Count
    reason: Line


class HostJoined(Message):
    """Another host has come, with what it has: plan for its workers. The answer is HostPlanned."""

    kind = "host-joined"
    host: Name
    facts: HostFacts


class HostPlanned(Message):
    """The workers of another host from now on, or why there can be none."""

    kind = "host-planned"
    host: Name
    workers: Annotated[tuple[WorkerSpec, ...], Field(max_length=1024)] = ()
    gpus: Text = ""  # JSON of AccountSettings by GPU, of those whose memory is leased
    code: Name = "error"
    reason: Line = ""  # empty: it is welcome
    hint: Line = ""


class EndHosts(Message):
    """The stack ends: no host is to have workers."""

    kind = "end-hosts"


FROM_SUPERVISOR: tuple[type[Message], ...] = (SupervisorHello, Processes, ModelAdded, HostPlanned, EndHosts)
TO_SUPERVISOR: tuple[type[Message], ...] = (
    SetScale, WakeModel, AddModel, RemoveModel, RestartProcess, KillProcess, HostJoined, Beat, Error,
)  # fmt: skip

"""Messages between the agent of another host, which keeps the workers there, and the orchestrator."""

from typing import Annotated

from pydantic import Field

from protocol.host import HostFacts
from protocol.messages.common import Beat, Count, Error, Message, ProcessName, Welcome
from protocol.messages.supervisor import KillProcess, RestartProcess
from protocol.views import ProcessView
from protocol.worker_spec import WorkerSpec

MOST_PROCESSES = 4096
MOST_LOGGED = 65_536  # characters in one message
Pids = Annotated[tuple[Count, ...], Field(max_length=MOST_PROCESSES)]


class HostHello(Message):
    """First word of each link: what the host has, and the workers' processes that live there now."""

    kind = "host-hello"
    facts: HostFacts
    pid: Count  # of the agent
    after: Count = 0  # the agent that had this one's folder before, and is gone by the folder's lock
    pids: Pids = ()


class HostStatus(Message):
    """The processes that the agent keeps: once a second as a sign of life, and at once when one has ended."""

    kind = "host-status"
    processes: Annotated[tuple[ProcessView, ...], Field(max_length=MOST_PROCESSES)] = ()
    exited_pids: Pids = ()
    stopped_pids: Pids = ()  # of them, which no task can have ended
    used_bytes: Annotated[tuple[Count, ...], Field(max_length=64)] = ()  # of each GPU of the facts, by its driver
    heard: Count = 0  # the number of the last HostWorkers


class HostLog(Message):
    """What a worker has written to its log since."""

    kind = "host-log"
    name: ProcessName
    text: Annotated[str, Field(max_length=MOST_LOGGED)]


class HostGoodbye(Message):
    """The agent ends, and its workers have ended."""

    kind = "host-goodbye"


class HostWorkers(Message):
    """The workers that the host is to have from now on. What their paths and their way here are the agent knows."""

    kind = "host-workers"
    number: Count  # of this word; the agent's status says which it has heard last
    workers: Annotated[tuple[WorkerSpec, ...], Field(max_length=1024)]


class HostEnds(Message):
    """The stack ends: the host is to have no workers, and an agent that Ray has started ends, too."""

    kind = "host-ends"


FROM_HOST: tuple[type[Message], ...] = (HostHello, HostStatus, HostLog, HostGoodbye)
TO_HOST: tuple[type[Message], ...] = (Welcome, HostWorkers, HostEnds, RestartProcess, KillProcess, Beat, Error)

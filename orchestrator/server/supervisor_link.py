"""The supervisor as the orchestrator knows it: what processes it keeps, and what it is to do with them."""

from collections import deque
from collections.abc import Sequence

from orchestrator.dispatch.fleet import Fleet
from orchestrator.dispatch.outbox import Outbox
from protocol.errors import NotFound
from protocol.messages.common import Message
from protocol.messages.supervisor import (
    AddModel,
    KillProcess,
    Processes,
    RemoveModel,
    RestartProcess,
    SetScale,
    WakeModel,
)
from protocol.model_spec import ModelSpec
from protocol.stages import Stage
from protocol.views import ProcessView


class SupervisorLink:
    def __init__(self, outbox: Outbox, fleet: Fleet) -> None:
        self._outbox, self._fleet = outbox, fleet
        self._identity: bytes | None = None  # at the workers' socket
        self.processes: tuple[ProcessView, ...] = ()
        self._rolling: deque[str] = deque()  # names of processes to be restarted, one after the other
        self._under_way: int | None = None  # process number of the first's old life

    # -- what it says ---------------------------------------------------------------------------

    def hello(self, identity: bytes) -> None:
        self._identity = identity

    def is_here(self, identity: bytes) -> bool:
        """Return whether a message is the present supervisor's."""
        return identity == self._identity

    def gone(self) -> None:
        """Forget the supervisor, which can't be reached."""
        self._identity = None

    def keeps(self, processes: Processes) -> None:
        self.processes = processes.processes

    # -- what it is to do -----------------------------------------------------------------------

    def check(self, stage: Stage = "denoise") -> None:
        """Raise NotFound where there is no supervisor, so that workers are started by hand."""
        if self._identity is None:
            raise NotFound(
                "This stack runs without a supervisor.",
                f"Start workers by hand: triptych worker {stage} --connect ENDPOINT.",
            )

    def scale(self, model: str, stage: Stage, count: int) -> None:
        self._tell(SetScale(model=model, stage=stage, count=count))

    def wake(self, model: str, rest: bool = False) -> None:
        """Have a model's workers started, or ended until it is asked for again."""
        self._tell(WakeModel(model=model, rest=rest))

    def add_model(self, model: str, spec: ModelSpec) -> None:
        """Have a model planned for and added; the answer is ModelAdded."""
        self._tell(AddModel(model=model, spec=spec))

    def remove_model(self, model: str) -> None:
        self._tell(RemoveModel(model=model))

    def kill(self, pid: int, reason: str) -> None:
        """Have the supervisor end a process of its own; nothing happens if it isn't one, or there is no supervisor."""
        self._tell(KillProcess(pid=pid, reason=reason))

    def restart(self, stage: Stage) -> None:
        """Restart a stage's workers, one after the other."""
        self._restart([process.name for process in self.processes if process.stage == stage])

    def replace(self, names: list[str]) -> None:
        """Have workers replaced, one after the other, once there is a supervisor; the list is emptied then."""
        if self._identity is not None:
            self._restart(names)
            names.clear()

    def _restart(self, names: Sequence[str]) -> None:
        self._rolling.extend(name for name in names if name not in self._rolling)

    def roll(self) -> None:
        """Go on with restarts: the next worker once the one before is back, so that a stage is never without."""
        while self._rolling:
            name, old = self._rolling[0], self._under_way
            process = next((p for p in self.processes if p.name == name), None)
            if process is None or (process.pid is None and old is None):  # it is not there, or no more: a model rests
                self._rolling.popleft()
                self._under_way = None
                continue
            if process.pid is None:
                return
            if old is None:
                self._under_way = process.pid
                self._tell(RestartProcess(name=name))
                return
            namesakes = [w for w in self._fleet if w.hello.name == name and not w.process.key]
            back = any(w.hello.pid != old and w.state != "loading" for w in namesakes)
            if not back:
                return
            self._rolling.popleft()
            self._under_way = None

    def _tell(self, message: Message) -> None:
        if self._identity is not None:
            self._outbox.to_worker(self._identity, message)

"""The supervisor as the orchestrator knows it: what processes it keeps, and what it is to do with them."""

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
    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._identity: bytes | None = None  # at the workers' socket
        self.processes: tuple[ProcessView, ...] = ()

    # -- what it says ---------------------------------------------------------------------------

    def hello(self, identity: bytes) -> bool:
        """Note a supervisor's sign of life; return whether it is another one than before, or over another link."""
        known, self._identity = self._identity, identity
        return known != identity

    def is_here(self, identity: bytes) -> bool:
        """Return whether a message is the present supervisor's."""
        return identity == self._identity

    @property
    def there(self) -> bool:
        return self._identity is not None

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
        self.tell(SetScale(model=model, stage=stage, count=count))

    def wake(self, model: str, rest: bool = False) -> None:
        """Have a model's workers started, or ended until it is asked for again."""
        self.tell(WakeModel(model=model, rest=rest))

    def add_model(self, model: str, spec: ModelSpec) -> None:
        """Have a model planned for and added; the answer is ModelAdded."""
        self.tell(AddModel(model=model, spec=spec))

    def remove_model(self, model: str) -> None:
        self.tell(RemoveModel(model=model))

    def kill(self, pid: int, reason: str) -> None:
        """Have the supervisor end a process of its own; nothing happens if it isn't one, or there is no supervisor."""
        self.tell(KillProcess(pid=pid, reason=reason))

    def restart(self, name: str) -> bool:
        """Have a process replaced; return False where there is no supervisor."""
        self.tell(RestartProcess(name=name))
        return self._identity is not None

    def tell(self, message: Message) -> None:
        if self._identity is not None:
            self._outbox.to_worker(self._identity, message)

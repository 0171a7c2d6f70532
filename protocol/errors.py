"""The one hierarchy of errors. Each says what was given, what fits and what to do next.

An error crosses the wire as its `code`, `message` and `hint`, and comes out as the same class on the other side.
"""

from typing import ClassVar


class TriptychError(Exception):
    """Base of everything that Triptych raises on purpose.

    Attributes:
        message: one line for a person.
        hint: what to do next, possibly empty.
        code: stable name on the wire and in `--json`.
        exit_code: what the command line exits with.
        item: which of several requests is at fault, counted from 0; None where it is all of them.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.item: int | None = None

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadRequest(TriptychError):
    """Input that can't be right, refused before anything is queued."""

    code = "bad_request"
    exit_code = 2


class NotFound(BadRequest):
    """A job or worker that this stack doesn't know."""

    code = "not_found"


class Conflict(BadRequest):
    """A job id that is taken by a different job, or a state that doesn't allow the request."""

    code = "conflict"


class Forbidden(BadRequest):
    """A request that the key of its sender does not allow."""

    code = "forbidden"


class NoStack(TriptychError):
    """Nothing answers at the endpoint."""

    code = "no_stack"
    exit_code = 3


class VersionMismatch(NoStack):
    """The stack speaks another version of the protocol."""

    code = "version"


class ModelMissing(TriptychError):
    """The model isn't there, isn't permitted or can't be read."""

    code = "model_missing"
    exit_code = 4


class DoesNotFit(TriptychError):
    """More than the machine, the model or the queue can take."""

    code = "does_not_fit"
    exit_code = 5


class QueueFull(DoesNotFit):
    """The stack holds as many unfinished jobs as it may."""

    code = "queue_full"


class StateUnusable(TriptychError):
    """State that can't be written or read: a full or read-only disk, another release's database."""

    code = "state_unusable"
    exit_code = 7


class StateDamaged(StateUnusable):
    """Stored state that is not as it was written."""

    code = "state_damaged"
    exit_code = 8


class JobFailed(TriptychError):
    """An accepted job that ended without a picture."""

    code = "job_failed"
    exit_code = 6


class JobCancelled(JobFailed):
    """A job that somebody cancelled."""

    code = "job_cancelled"


class WaitTimeout(TriptychError):
    """The job goes on, but the wait for it is over."""

    code = "timeout"
    exit_code = 124


class ProtocolError(TriptychError):
    """Frames that are not a valid message."""

    code = "protocol"
    exit_code = 3


class Interrupted(Exception):
    """A signal ended a command before it was done."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


BY_CODE: dict[str, type[TriptychError]] = {
    kind.code: kind
    for kind in (
        TriptychError, BadRequest, NotFound, Conflict, Forbidden, NoStack, VersionMismatch, ModelMissing, DoesNotFit,
        QueueFull, StateUnusable, StateDamaged, JobFailed, JobCancelled, WaitTimeout, ProtocolError,
    )
}  # fmt: skip


def from_wire(code: str, message: str, hint: str) -> TriptychError:
    """The error that a reply stands for; a code of a later version becomes a plain TriptychError."""
    return BY_CODE.get(code, TriptychError)(message, hint)

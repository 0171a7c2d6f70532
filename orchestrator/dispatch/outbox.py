"""Messages that wait until what they promise is committed; and tasks and leases, which promise nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.messages.client import JobEvent
from protocol.messages.common import Message
from protocol.messages.worker import Borrow, Returned, SetLease, Task
from protocol.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Letter:
    to_worker: bool  # else to a client
    identity: bytes
    message: Message
    tensors: Sequence[Tensor] = ()


@dataclass(slots=True)
class Outbox:
    _letters: list[Letter] = field(default_factory=list)
    _tasks: list[Letter] = field(default_factory=list)
    _events: dict[tuple[bytes, str], Letter] = field(default_factory=dict)  # by client and job: the newest says it all

    def to_worker(self, identity: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Put in a message to a worker, or to the supervisor, which sits at the same socket."""
        letters = self._tasks if isinstance(message, Task | SetLease | Borrow | Returned) else self._letters
        letters.append(Letter(True, identity, message, tensors))

    def to_client(self, identity: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        letter = Letter(False, identity, message, tensors)
        if isinstance(message, JobEvent):
            self._events[identity, message.job] = letter
        else:
            self._letters.append(letter)

    def drain_tasks(self) -> Iterator[Letter]:
        """Take tasks, even before the commit: a crash hands them out again; their results then count for nothing."""
        letters, self._tasks = self._tasks, []
        return iter(letters)

    def drain(self) -> Iterator[Letter]:
        """Take out all the rest, answers before events."""
        letters, self._letters = [*self._letters, *self._events.values()], []
        self._events.clear()
        return iter(letters)

"""Messages that wait until what they promise is committed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from protocol.messages import Message
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

    def to_worker(self, identity: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        """Also to the supervisor, which sits at the same socket."""
        self._letters.append(Letter(True, identity, message, tensors))

    def to_client(self, identity: bytes, message: Message, tensors: Sequence[Tensor] = ()) -> None:
        self._letters.append(Letter(False, identity, message, tensors))

    def drain(self) -> Iterator[Letter]:
        letters, self._letters = self._letters, []
        return iter(letters)

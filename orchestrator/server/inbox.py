"""Messages that wait to be handled, by principal and connection: each principal in turn, within what it may cost.

This machine's workers and supervisor are not kept waiting here. A key's holder gets a part of one core's time. What a
client asks beyond what may wait is let go, and it asks again; what a worker says is not, since it won't say it again:
no more is read of the workers' door until there is room. A key that leaves none for FLOOD_SECONDS is not heard for a
while. A connection that doesn't read its answers gets no more of them; its other questions wait, and are let go later.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.doors.frames import size_of
from orchestrator.principal import KeyHolder, Principal
from orchestrator.token_bucket import TokenBucket
from protocol.curve_keys import DoorRole
from protocol.tensors import Buffer

CPU_SHARE, CPU_BURST = 0.25, 0.5  # of one core for one key, in seconds a second; and at once
MOST_WAITING = 1000  # messages of one principal
WAITING_BYTES = 64 << 20  # of them, beside one that may have any size
MOST_OF_LOCAL = 10 * MOST_WAITING  # messages of this machine's user
FLOOD_SECONDS, MUTE_SECONDS = 5.0, 30.0
MOST_UNANSWERED = 64  # messages of a connection that doesn't read its answers
UNREAD_SECONDS = 30.0  # that a message waits for its sender to read earlier answers
LOOK_SECONDS = 0.02  # between two looks whether it has


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came."""

    peer: bytes
    role: DoorRole
    principal: Principal
    frames: list[Buffer]
    at: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return size_of(self.frames)


@dataclass(slots=True)
class Waiting:
    """A principal's messages by connection, and the time of a core that it may cost; None: as much as it takes."""

    cpu: TokenBucket | None
    full_since: float = 0.0  # monotonic seconds; 0: it is not
    peers: OrderedDict[bytes, deque[Received]] = field(default_factory=OrderedDict)
    messages: int = 0
    size: int = 0  # bytes of them

    @property
    def full(self) -> bool:
        most = MOST_WAITING if self.cpu else MOST_OF_LOCAL
        return self.messages >= most or self.size >= WAITING_BYTES

    def of(self, peer: bytes) -> int:
        """Return how many messages of a connection wait."""
        return len(self.peers.get(peer, ()))

    def put(self, received: Received) -> None:
        self.peers.setdefault(received.peer, deque()).append(received)
        self._count(received, 1)

    def take(self, may_answer: Callable[[Principal, bytes], bool]) -> Received | None:
        """Take the next message of a connection that reads its answers, each in turn; None if there is none."""
        for peer in list(self.peers):
            own = self.peers[peer]
            while own and time.monotonic() - own[0].at > UNREAD_SECONDS and not may_answer(own[0].principal, peer):
                self._count(own.popleft(), -1)
            if not own:
                del self.peers[peer]
            elif may_answer(own[0].principal, peer):
                received = own.popleft()
                self._count(received, -1)
                self.peers.move_to_end(peer)
                if not own:
                    del self.peers[peer]
                return received
        return None

    def forget(self, peer: bytes) -> None:
        for received in self.peers.pop(peer, ()):
            self._count(received, -1)

    def _count(self, received: Received, by: int) -> None:
        self.messages += by
        self.size += by * received.size
        if not self.full:
            self.full_since = 0.0
        elif not self.full_since:
            self.full_since = time.monotonic()


class Inbox:
    """`may_answer` tells whether a principal's connection has read enough of its earlier answers."""

    def __init__(self, may_answer: Callable[[Principal, bytes], bool]) -> None:
        self._may_answer = may_answer
        self._waiting: dict[Principal, Waiting] = {}
        self._cpu: dict[Principal, TokenBucket] = {}
        self._turns: deque[Principal] = deque()  # principals with messages, the one whose turn is next first
        self._muted: dict[Principal, float] = {}  # workers' keys that are not heard, until when
        self._blocked = False  # whoever has messages may have none answered now

    def full(self, principal: Principal) -> bool:
        """Return whether no more of a principal's messages may wait."""
        waiting = self._waiting.get(principal)
        return waiting is not None and waiting.full

    def put(self, received: Received) -> bool:
        """Let a message wait for its turn; return False where too many do already, and it is let go."""
        principal = received.principal
        if received.role == "worker" and self._muted.get(principal, 0.0) > time.monotonic():
            return False
        waiting = self._waiting.get(principal)
        if waiting is None:
            waiting = self._waiting[principal] = Waiting(self._bucket(principal))
            self._turns.append(principal)
        if received.role == "client" and (waiting.full or self._leaves_unread(waiting, received)):
            return False
        waiting.put(received)
        return True

    def _leaves_unread(self, waiting: Waiting, received: Received) -> bool:
        many = waiting.of(received.peer) >= MOST_UNANSWERED
        return many and not self._may_answer(received.principal, received.peer)

    def has_room(self) -> bool:
        """Return whether more may be read of what workers behind doors say."""
        return not any(waiting.full and self._says_work(waiting) for waiting in self._waiting.values())

    @staticmethod
    def _says_work(waiting: Waiting) -> bool:
        return any(own[0].role == "worker" for own in waiting.peers.values() if own)

    def floods(self) -> list[Principal]:
        """Return the workers' keys that have left no room for others for too long, and are not heard for a while."""
        now = time.monotonic()
        found = [
            principal
            for principal, waiting in self._waiting.items()
            if waiting.full_since and now - waiting.full_since > FLOOD_SECONDS and self._says_work(waiting)
        ]
        for principal in found:
            self._muted[principal] = now + MUTE_SECONDS
            for peer in list(self._waiting[principal].peers):
                self._waiting[principal].forget(peer)
        return found

    def spend(self, principal: Principal, seconds: float) -> None:
        """Count time of the core that was spent for a principal outside of `serve`."""
        if bucket := self._bucket(principal):
            bucket.spend(seconds)

    def serve(self, handle: Callable[[Received], None], seconds: float) -> None:
        """Handle messages for about so many seconds, one of each principal in turn."""
        until = time.monotonic() + seconds
        blocked: list[Principal] = []
        while self._turns and (begun := time.monotonic()) < until:
            principal = self._turns.popleft()
            waiting = self._waiting[principal]
            affordable = waiting.cpu is None or waiting.cpu.left() > 0
            received = waiting.take(self._may_answer) if affordable else None
            if not waiting.messages and received is None:
                del self._waiting[principal]
                continue
            if received is None:
                blocked.append(principal)
                continue
            handle(received)
            if waiting.cpu is not None:
                waiting.cpu.spend(time.monotonic() - begun)
            if waiting.messages:
                self._turns.append(principal)
            else:
                del self._waiting[principal]
        self._blocked = bool(blocked) and not self._turns
        self._turns.extend(blocked)

    def next_due(self) -> float | None:
        """Seconds until there may be something to do; None where nothing waits."""
        if not self._turns:
            return None
        return LOOK_SECONDS if self._blocked else 0.0

    def forget(self, peer: bytes) -> None:
        """Let go of the messages of a connection that is gone."""
        for waiting in self._waiting.values():
            waiting.forget(peer)

    def _bucket(self, principal: Principal) -> TokenBucket | None:
        if not isinstance(principal, KeyHolder):
            return None
        return self._cpu.setdefault(principal, TokenBucket(CPU_SHARE, CPU_BURST))

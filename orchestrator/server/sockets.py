"""The orchestrator's sockets, all private to this machine's user: its own peers come to them, and doors for others.

A peer is known here by a byte for the socket that it came through and its socket's identity.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import zmq

from orchestrator.access import AllowedKeys
from orchestrator.counted_log import CountedLog
from orchestrator.doors.frames import LARGEST_QUESTION, send_tracked, size_of
from orchestrator.principal import LOCAL_USER, Principal, to_column
from orchestrator.server.door_sockets import DoorSockets, behind_a_door
from orchestrator.server.inbox import Received
from orchestrator.server.unread import Unread
from protocol.client.endpoints import Endpoints
from protocol.curve_keys import DOORS, DoorRole
from protocol.sockets import COPY_BELOW, receive, router, send
from protocol.tensors import Buffer

log = logging.getLogger(__name__)

BATCH = 256  # messages of one socket between two commits


class Sockets:
    """`remote`, `inside` and `allowed` are those of DoorSockets."""

    def __init__(
        self,
        local: Endpoints,
        remote: Sequence[tuple[DoorRole, str]],
        inside: Mapping[DoorRole, str],
        allowed: AllowedKeys | None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._local: dict[DoorRole, zmq.Socket[bytes]] = {
            "client": router(self._context, local.clients, largest=LARGEST_QUESTION),
            "worker": router(self._context, local.workers),
        }
        names = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._local.values()]
        self.local = Endpoints(names[0], names[1])
        self.counted, self.unread = CountedLog(log), Unread()
        self.doors = DoorSockets(self._context, remote, inside, allowed, self.unread, self.counted)
        self.heard_all = True  # nothing was left to be read at the last look
        self._poller = zmq.Poller()
        for socket in (*self._local.values(), *self.doors.sockets):
            self._poller.register(socket, zmq.POLLIN)

    def wait(self, milliseconds: int) -> None:
        self._poller.poll(milliseconds)

    def received(self, role: DoorRole, takes: Callable[[], bool]) -> Iterator[Received]:
        """Yield what this machine's peers of a role have sent, as much as lets others come to their turn.

        It stays where it is while nobody `takes` it.
        """
        prefix, self.heard_all = bytes([DOORS.index(role)]), True
        for _ in range(BATCH):
            if not takes():
                break
            try:
                identity, *frames = receive(self._local[role])
            except zmq.Again:
                return
            yield Received(prefix + bytes(identity), role, LOCAL_USER, frames)
        self.heard_all = False

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Send without waiting. ZMQError EHOSTUNREACH: the peer is gone, or its key was revoked; EAGAIN: it is full."""
        if behind_a_door(peer):
            self.doors.send(peer, frames)
            return
        role, size = DOORS[peer[0]], size_of(frames)
        socket = self._local[role]
        if role == "worker" or size < COPY_BELOW:
            send(socket, [peer[1:], *frames])
        else:
            self.unread.add(LOCAL_USER, peer, size, send_tracked(socket, [peer[1:], *frames]))

    def principal_of(self, peer: bytes) -> Principal | None:
        """Return on whose behalf a peer is here; None if it is not let in any more."""
        return self.doors.principal_of(peer) if behind_a_door(peer) else LOCAL_USER

    def takes_answers(self, principal: Principal, peer: bytes) -> bool:
        """Return whether a peer reads what it asks for; one that doesn't gets no more of it."""
        if self.unread.takes_answers(principal, peer):
            return True
        self.counted.warn(f"a client of {to_column(principal) or 'this machine'} doesn't read its answers")
        return False

    def close(self) -> None:
        for socket in (*self._local.values(), *self.doors.sockets):
            socket.close()
        self._context.term()

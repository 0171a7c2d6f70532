"""The orchestrator's sockets, all private to this machine's user: its own peers come to them, and doors for others.

A peer is known here by a byte for the socket that it came through and its socket's identity; behind a door it keeps
both when that door is started anew.
"""

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import zmq

from orchestrator.access import AllowedKeys
from orchestrator.counted_log import CountedLog
from orchestrator.doors import frames as frames_of
from orchestrator.doors.frames import (
    BEAT,
    COUNTED_BYTES,
    HIGH_WATER,
    LARGEST_QUESTION,
    MESSAGE,
    OPEN,
    largest_frame,
    send_tracked,
    size_of,
    unpacked,
)
from orchestrator.principal import LOCAL_USER, KeyHolder, Principal, to_column
from orchestrator.server.inbox import Received
from orchestrator.server.unread import Unread
from protocol.client.endpoints import Endpoints
from protocol.curve_keys import Role
from protocol.sockets import COPY_BELOW, receive, router, send
from protocol.tensors import Buffer

log = logging.getLogger(__name__)

SILENCE_SECONDS = 10.0  # of a door
BATCH = 256  # messages of one socket between two commits
MOST_CONNECTIONS = 64  # of one client's key
ROLES: tuple[Role, ...] = ("client", "worker")


@dataclass(slots=True)
class DoorSocket:
    """Where a role's door connects, and what is known of that door."""

    socket: "zmq.Socket[bytes]"
    wanted: str  # TCP endpoint to listen at; the port that the first door found, once there was one
    identity: bytes = b""
    pid: int = 0
    heard: float = 0.0  # monotonic seconds
    listens: bool = False


def behind_a_door(peer: bytes) -> bool:
    return peer[0] >= len(ROLES)


class Sockets:
    """`remote` are TCP endpoints at which doors are to listen, `doors` the private ones where those come to.

    Without a list of keys whoever comes through a door is this machine's user: it listens on the loopback address only.
    """

    def __init__(
        self,
        local: Endpoints,
        remote: Sequence[tuple[Role, str]],
        doors: Mapping[Role, str],
        allowed: AllowedKeys | None,
    ) -> None:
        self._allowed = allowed
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._local: dict[Role, zmq.Socket[bytes]] = {
            "client": router(self._context, local.clients, largest=LARGEST_QUESTION),
            "worker": router(self._context, local.workers),
        }
        self._doors: dict[Role, DoorSocket] = {
            role: DoorSocket(self._for_door(doors[role], role), endpoint) for role, endpoint in remote
        }
        names = [socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._local.values()]
        self.local = Endpoints(names[0], names[1])
        self.counted = CountedLog(log)
        self.unread = Unread()
        self.heard_all = self.heard_door = True  # nothing of a role's was left to be read here, and of its door, lately
        self._keys: dict[bytes, str] = {}  # public keys, by the peers that came with them
        self._peers: dict[str, OrderedDict[bytes, None]] = {}  # clients by public key, the one heard last comes last
        self._gone: list[bytes] = []
        self._lost_doors: list[Role] = []
        self._poller = zmq.Poller()
        for socket in (*self._local.values(), *(door.socket for door in self._doors.values())):
            self._poller.register(socket, zmq.POLLIN)

    def _for_door(self, inside: str, role: Role) -> "zmq.Socket[bytes]":
        return router(self._context, inside, largest=largest_frame(role), high_water=HIGH_WATER)

    @property
    def remote(self) -> dict[Role, str]:
        """TCP endpoints by role at which doors listen."""
        return {role: door.wanted for role, door in self._doors.items() if door.listens}

    def wait(self, milliseconds: int) -> None:
        self._poller.poll(milliseconds)

    def received(self, role: Role, takes: Callable[[Principal | None], bool]) -> Iterator[Received]:
        """Yield what has come from a role's peers, of each socket so much that others come to their turn.

        What this machine's user sends, and what workers behind a door do, stays where it is while nobody `takes` it.
        """
        self.heard_all = self.heard_door = True
        yield from self._hear(role, takes)
        if door := self._doors.get(role):
            yield from self._hear_door(role, door, takes)

    def _hear(self, role: Role, takes: Callable[[Principal | None], bool]) -> Iterator[Received]:
        prefix = bytes([ROLES.index(role)])
        for _ in range(BATCH):
            if not takes(LOCAL_USER):
                break
            try:
                identity, *frames = receive(self._local[role])
            except zmq.Again:
                return
            yield Received(prefix + bytes(identity), role, LOCAL_USER, frames)
        self.heard_all = False

    def _hear_door(self, role: Role, door: DoorSocket, takes: Callable[[Principal | None], bool]) -> Iterator[Received]:
        prefix = bytes([len(ROLES) + ROLES.index(role)])
        for _ in range(BATCH):
            if role == "worker" and not takes(None):
                break
            try:
                identity, kind, peer, *frames = receive(door.socket)
            except zmq.Again:
                return
            match bytes(kind):
                case frames_of.HELLO:
                    self._greet(role, door, bytes(identity), bytes(peer).decode(), unpacked(frames[0]))
                case _ if bytes(identity) != door.identity:
                    pass  # of a door that is no more
                case frames_of.MESSAGE:
                    public = bytes(frames[0]).decode()
                    if (principal := self._principal(prefix + bytes(peer), public, role)) is not None:
                        yield Received(prefix + bytes(peer), role, principal, frames[1:])
                case frames_of.READ:
                    whom = self._known(prefix + bytes(peer), role)
                    if whom is not None:
                        self.unread.read(whom, prefix + bytes(peer), unpacked(frames[0]))
                case frames_of.GONE:
                    self._forget(prefix + bytes(peer), role)
        self.heard_door = False

    # -- doors ----------------------------------------------------------------------------------

    def _greet(self, role: Role, door: DoorSocket, identity: bytes, endpoint: str, pid: int) -> None:
        """Answer a door's hello: where it is to listen, as long as it doesn't; else that it was heard."""
        if door.identity not in (b"", identity):
            log.warning("the door for %ss has come anew", role)
            self._lost_doors.append(role)
            self.unread.forget_behind(bytes([len(ROLES) + ROLES.index(role)]))
            for peer in [peer for peer in self._keys if peer[0] == len(ROLES) + ROLES.index(role)]:
                del self._keys[peer]
        door.identity, door.pid, door.heard = identity, pid, time.monotonic()
        if endpoint:
            door.wanted, door.listens = endpoint, True
        with contextlib.suppress(zmq.Again):  # it has much to do, and is heard again soon
            self._tell(door, BEAT) if endpoint else self._tell(door, OPEN, door.wanted.encode())

    def _tell(self, door: DoorSocket, *frames: Buffer) -> None:
        """Send to a door. Where there is none now nothing is sent: the next one lets all its peers begin anew."""
        try:
            send(door.socket, [door.identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise

    def door_pids(self) -> tuple[int, ...]:
        """Process numbers of doors that listen."""
        return tuple(door.pid for door in self._doors.values() if door.listens)

    def silent_doors(self) -> list[int]:
        """Process numbers of doors that have said nothing for too long; said once of each."""
        now = time.monotonic()
        silent = [door for door in self._doors.values() if door.pid and now - door.heard > SILENCE_SECONDS]
        pids = [door.pid for door in silent]
        for door in silent:
            door.pid = 0
        return pids

    def principal_of(self, peer: bytes) -> Principal | None:
        """Return on whose behalf a peer is here; None if it is not let in any more."""
        return self._known(peer, ROLES[peer[0] % len(ROLES)]) if behind_a_door(peer) else LOCAL_USER

    def lost_doors(self) -> list[Role]:
        """Roles whose door has come anew since the last call: what was on its way is lost."""
        lost, self._lost_doors = self._lost_doors, []
        return lost

    # -- whose a message is ---------------------------------------------------------------------

    def _known(self, peer: bytes, role: Role) -> Principal | None:
        """Return on whose behalf a peer behind a door has come; None if that is not let in, or not any more."""
        if self._allowed is None:
            return LOCAL_USER
        entry = self._allowed.entry(self._keys.get(peer, ""), role)
        return KeyHolder(entry.name) if entry else None

    def _principal(self, peer: bytes, public: str, role: Role) -> Principal | None:
        """Return on whose behalf a message has come, and remember its peer; None if its key is not let in."""
        if self._allowed is None:
            return LOCAL_USER
        if (entry := self._allowed.entry(public, role)) is None:
            return None
        self._keys[peer] = public
        if role == "client":
            self._cap(public, peer, entry.name)
        return KeyHolder(entry.name)

    def _cap(self, public: str, peer: bytes, name: str) -> None:
        """Forget the connection of a key that was silent for longest, where it has more than it may."""
        peers = self._peers.setdefault(public, OrderedDict())
        peers[peer] = None
        peers.move_to_end(peer)
        if len(peers) > MOST_CONNECTIONS:
            self._forget(next(iter(peers)), "client")
            self.counted.warn(f"{name} has more than {MOST_CONNECTIONS} connections; the oldest are forgotten")

    def _forget(self, peer: bytes, role: Role) -> None:
        """Forget a peer behind a door, and have others forget it."""
        if (principal := self._known(peer, role)) is not None:
            self.unread.forget(principal, peer)
        self._peers.get(self._keys.pop(peer, ""), OrderedDict()).pop(peer, None)
        self._gone.append(peer)

    def gone(self) -> list[bytes]:
        """The peers that were forgotten since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def shut_out(self) -> list[bytes]:
        """The peers whose keys have been revoked since the last call."""
        if self._allowed is None or not self._allowed.look_again():
            return []
        gone = [peer for peer in self._keys if self._known(peer, ROLES[peer[0] - len(ROLES)]) is None]
        for key in {self._keys.pop(peer) for peer in gone}:
            self._peers.pop(key, None)
        return gone

    # -- what is sent ---------------------------------------------------------------------------

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Send without waiting. ZMQError EHOSTUNREACH: the peer is gone, or its key was revoked; EAGAIN: it is full.

        What a door can't send it tells of later.
        """
        role, size = ROLES[peer[0] % len(ROLES)], size_of(frames)
        if not behind_a_door(peer):
            socket = self._local[role]
            if role == "worker" or size < COPY_BELOW:
                send(socket, [peer[1:], *frames])
            else:
                self.unread.add(LOCAL_USER, peer, size, send_tracked(socket, [peer[1:], *frames]))
            return
        principal = self._known(peer, role)
        if principal is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._tell(self._doors[role], MESSAGE, peer[1:], *frames)
        if role == "client" and size >= COUNTED_BYTES:
            self.unread.add(principal, peer, size)

    def takes_answers(self, principal: Principal, peer: bytes) -> bool:
        """Return whether a peer reads what it asks for; one that doesn't gets no more of it."""
        if self.unread.takes_answers(principal, peer):
            return True
        self.counted.warn(f"a client of {to_column(principal) or 'this machine'} doesn't read its answers")
        return False

    def close(self) -> None:
        for socket in (*self._local.values(), *(door.socket for door in self._doors.values())):
            socket.close()
        self._context.term()

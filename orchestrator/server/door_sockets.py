"""The orchestrator's side of its doors: what comes through them from peers of other hosts, and what goes back.

A peer behind a door is known by a byte for its role and its socket's identity; it keeps both when the door is started
anew. What was on its way through the old one is lost: workers say anew what they have, and clients ask again.
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
from orchestrator.doors.frames import BEAT, COUNTED_BYTES, HIGH_WATER, MESSAGE, OPEN, largest_frame, size_of, unpacked
from orchestrator.principal import LOCAL_USER, Principal
from orchestrator.server.inbox import Received
from orchestrator.server.unread import Unread
from protocol.curve_keys import DOORS, DoorRole
from protocol.sockets import receive, router, send
from protocol.tensors import Buffer

log = logging.getLogger(__name__)

BATCH = 256  # messages of one door between two commits
SILENCE_SECONDS = 10.0  # of a door
MOST_CONNECTIONS = 64  # of one client's key, that are answered


@dataclass(slots=True)
class DoorSocket:
    """The socket that a role's door connects to, and what is known of that door."""

    socket: "zmq.Socket[bytes]"
    wanted: str  # TCP endpoint to listen at; the port that the first door found, once there was one
    identity: bytes = b""
    pid: int = 0
    heard: float = 0.0  # monotonic seconds
    listens: bool = False


def prefix_of(role: DoorRole) -> bytes:
    """Return how the names of a role's peers behind its door begin."""
    return bytes([len(DOORS) + DOORS.index(role)])


def role_of(peer: bytes) -> DoorRole:
    return DOORS[peer[0] - len(DOORS)]


def behind_a_door(peer: bytes) -> bool:
    return peer[0] >= len(DOORS)


class DoorSockets:
    """`remote` are TCP endpoints at which doors are to listen, `inside` the private ones where those come to, by role.

    Without a list of keys whoever comes through a door is this machine's user: it listens on the loopback address only.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        remote: Sequence[tuple[DoorRole, str]],
        inside: Mapping[DoorRole, str],
        allowed: AllowedKeys | None,
        unread: Unread,
        counted: CountedLog,
    ) -> None:
        self._allowed, self._unread, self._counted = allowed, unread, counted
        self._doors: dict[DoorRole, DoorSocket] = {
            role: DoorSocket(
                router(context, inside[role], largest=largest_frame(role), high_water=HIGH_WATER), endpoint
            )
            for role, endpoint in remote
        }
        self.heard_all = True  # nothing was left to be read at the last look
        self._keys: dict[bytes, str] = {}  # public keys, by the peers that came with them
        self._peers: dict[str, OrderedDict[bytes, None]] = {}  # clients by public key, the one heard last comes last
        self._gone: list[bytes] = []
        self._lost: list[DoorRole] = []

    @property
    def sockets(self) -> "list[zmq.Socket[bytes]]":
        return [door.socket for door in self._doors.values()]

    @property
    def remote(self) -> dict[DoorRole, str]:
        """TCP endpoints by role at which doors listen."""
        return {role: door.wanted for role, door in self._doors.items() if door.listens}

    # -- what comes -----------------------------------------------------------------------------

    def received(self, role: DoorRole, takes: Callable[[], bool]) -> Iterator[Received]:
        """Yield what a role's peers have sent. It stays where it is while nobody `takes` it."""
        self.heard_all = True
        if (door := self._doors.get(role)) is None:
            return
        for _ in range(BATCH):
            if not takes():
                break
            try:
                identity, kind, peer, *frames = receive(door.socket)
            except zmq.Again:
                return
            if bytes(kind) == frames_of.HELLO:
                self._greet(role, door, bytes(identity), bytes(peer).decode(), unpacked(frames[0]))
            elif bytes(identity) == door.identity:  # else of a door that is no more
                yield from self._take(role, bytes(kind), prefix_of(role) + bytes(peer), frames)
        self.heard_all = False

    def _take(self, role: DoorRole, kind: bytes, peer: bytes, frames: list[Buffer]) -> Iterator[Received]:
        match kind:
            case frames_of.MESSAGE:
                if (principal := self._let_in(peer, bytes(frames[0]).decode(), role)) is not None:
                    yield Received(peer, role, principal, frames[1:])
            case frames_of.READ:
                if (principal := self.principal_of(peer)) is not None:
                    self._unread.read(principal, peer, unpacked(frames[0]))
            case frames_of.GONE:
                self._forget(peer)

    def _let_in(self, peer: bytes, public: str, role: DoorRole) -> Principal | None:
        """Return on whose behalf a message has come, and remember its peer; None if its key is not let in."""
        if self._allowed is None:
            return LOCAL_USER
        if (entry := self._allowed.entry(public, role)) is None:
            return None
        self._keys[peer] = public
        if role == "client":
            self._cap(public, peer, entry.name)
        return entry.principal

    def _cap(self, public: str, peer: bytes, name: str) -> None:
        """Forget the connection of a key that was silent for longest, where it has more than it may."""
        peers = self._peers.setdefault(public, OrderedDict())
        peers[peer] = None
        peers.move_to_end(peer)
        if len(peers) > MOST_CONNECTIONS:
            self._forget(next(iter(peers)))
            self._counted.warn(f"{name} has more than {MOST_CONNECTIONS} connections; the oldest are forgotten")

    def principal_of(self, peer: bytes) -> Principal | None:
        """Return on whose behalf a peer has come; None if it is not let in, or not any more."""
        if self._allowed is None:
            return LOCAL_USER
        entry = self._allowed.entry(self._keys.get(peer, ""), role_of(peer))
        return entry.principal if entry else None

    # -- doors ----------------------------------------------------------------------------------

    def _greet(self, role: DoorRole, door: DoorSocket, identity: bytes, endpoint: str, pid: int) -> None:
        """Answer a door's hello: where it is to listen, as long as it doesn't; else that it was heard."""
        if door.identity not in (b"", identity):
            log.warning("the door for %ss has come anew", role)
            self._lost.append(role)
            self._unread.forget_behind(prefix_of(role))
            self._keys = {peer: key for peer, key in self._keys.items() if not peer.startswith(prefix_of(role))}
            if role == "client":
                self._peers.clear()
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

    def pids(self) -> tuple[int, ...]:
        """Process numbers of doors that listen."""
        return tuple(door.pid for door in self._doors.values() if door.listens)

    def silent(self) -> list[int]:
        """Process numbers of doors that have said nothing for too long; said once of each."""
        now = time.monotonic()
        silent = [door for door in self._doors.values() if door.pid and now - door.heard > SILENCE_SECONDS]
        pids = [door.pid for door in silent]
        for door in silent:
            door.pid = 0
        return pids

    def lost(self) -> list[DoorRole]:
        """Roles whose door has come anew since the last call."""
        lost, self._lost = self._lost, []
        return lost

    # -- those that are gone --------------------------------------------------------------------

    def _forget(self, peer: bytes) -> None:
        """Forget a peer, and have others forget it."""
        if (principal := self.principal_of(peer)) is not None:
            self._unread.forget(principal, peer)
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
        gone = [peer for peer in self._keys if self.principal_of(peer) is None]
        for key in {self._keys.pop(peer) for peer in gone}:
            self._peers.pop(key, None)
        return gone

    # -- what goes ------------------------------------------------------------------------------

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Send without waiting. ZMQError EHOSTUNREACH: its key was revoked; EAGAIN: its door has much to do.

        That a peer is gone its door tells of later.
        """
        role, principal = role_of(peer), self.principal_of(peer)
        if principal is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._tell(self._doors[role], MESSAGE, peer[1:], *frames)
        if role == "client" and (size := size_of(frames)) >= COUNTED_BYTES:
            self._unread.add(principal, peer, size)

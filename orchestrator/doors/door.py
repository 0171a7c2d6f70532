"""A door: the process between TCP and the orchestrator, for peers of one role. It knows keys and bytes, no messages.

Whoever comes over TCP is met here: authenticated, counted, and held to limits, in a process of its own with memory and
files of its own. libzmq hands over whole messages only, however large; what breaks this process by that ends its own
connections, which come again, and nobody else's. The orchestrator is on the other side of a private socket.
"""

import logging
import os
import resource
import secrets
import time
from collections import OrderedDict, deque
from types import FrameType

import zmq
from zmq.utils import z85

from orchestrator.access import AllowedKeys, KeyFolder
from orchestrator.counted_log import CountedLog
from orchestrator.doors import frames as frames_of
from orchestrator.doors.frames import (
    COUNTED_BYTES,
    GONE,
    HELLO,
    HELLO_SECONDS,
    HIGH_WATER,
    LARGEST_QUESTION,
    MESSAGE,
    READ,
    largest_frame,
    packed,
    receive_with_user,
    send_tracked,
    size_of,
)
from orchestrator.doors.front import Front
from orchestrator.settings import DoorSpec
from orchestrator.state_folder import StackFolder
from orchestrator.token_bucket import TokenBucket
from protocol.curve_keys import DoorRole
from protocol.sockets import check_endpoint, dealer, receive, router, send
from protocol.tensors import Buffer
from protocol.wire import MAX_TENSORS

log = logging.getLogger(__name__)

ZAP = "inproc://zeromq.zap.01"
BATCH = 256  # messages of one side before the other is heard again
MESSAGES_A_SECOND, BURST = 200.0, 1000.0  # of one client's key
MOST_CONNECTIONS: dict[DoorRole, int] = {"client": 512, "worker": 4096}  # at once, those not yet authenticated too
OWN_FILES = 64  # that a door has open besides
MEMORY_BYTES: dict[DoorRole, int] = {"client": 1 << 30, "worker": 2 << 30}  # of this process; what takes more ends it
LARGEST_MESSAGE: dict[DoorRole, int] = {"client": LARGEST_QUESTION + (16 << 20), "worker": 1 << 29}  # bytes
DEAF_SECONDS = 10.0  # that the orchestrator may leave a door without an answer before it is connected to anew
REMEMBERED = 1000  # peers of a key


class Door:
    """`connections`: how many there may be at once."""

    def __init__(self, spec: DoorSpec, connections: int) -> None:
        self._connections = connections
        self._role, self._inside_endpoint = spec.role, spec.inside
        self._keys = KeyFolder(StackFolder(spec.state).keys)
        self._allowed = AllowedKeys(self._keys)
        self._secret = self._keys.server().secret if spec.guarded else None
        self._endpoint = ""  # where it listens, once it does
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP)
        self._inside = self._connect()
        self._outside: zmq.Socket[bytes] | None = None
        self._front = Front(connections, self._secret is not None, self._turned_away, self._full)
        self._poller = zmq.Poller()
        for socket in (self._zap, self._inside):
            self._poller.register(socket, zmq.POLLIN)
        self._buckets: dict[str, TokenBucket] = {}  # by public key
        self._key_of: dict[bytes, str] = {}  # public keys by peer
        self._peers: dict[str, OrderedDict[bytes, None]] = {}  # by public key, those heard last come last
        self._unread: deque[tuple[bytes, int, list[zmq.MessageTracker]]] = deque()
        self._said_hello = 0.0
        self._heard = time.monotonic()
        self._counted = CountedLog(log)
        self._listening = True  # for what peers say
        self._stopping = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def run(self) -> None:
        """Pass on what comes, until told to stop. BadRequest where nothing can listen at the endpoint."""
        while not self._stopping:
            self._listen_to_peers()
            self._poller.poll(20 if self._unread or not self._listening else int(HELLO_SECONDS * 500))
            if self._front.failure:
                raise self._front.failure
            self._allowed.look_again()
            self._admit()
            self._hello()
            self._hear_orchestrator()
            self._hear_peers()
            self._tell_what_was_read()
            self._counted.tell()
        self._front.close()
        self._context.destroy(linger=100)

    # -- the orchestrator -----------------------------------------------------------------------

    def _connect(self) -> "zmq.Socket[bytes]":
        identity = b"D" + secrets.token_bytes(15)
        return dealer(self._context, self._inside_endpoint, identity, high_water=HIGH_WATER)

    def _hello(self) -> None:
        """Say where this door is, now and then: it is its sign of life, and another orchestrator must hear it anew."""
        now = time.monotonic()
        if now - self._heard > DEAF_SECONDS:
            self._heard = now
            self._poller.unregister(self._inside)
            self._inside.close(linger=0)
            self._inside = self._connect()
            self._poller.register(self._inside, zmq.POLLIN)
        if now - self._said_hello >= HELLO_SECONDS:
            self._said_hello = now
            self._say(HELLO, self._endpoint.encode(), packed(os.getpid()))

    def _say(self, *frames: Buffer) -> bool:
        """Tell the orchestrator; return False where it is not there, or has too much to do to hear it."""
        try:
            send(self._inside, frames)
        except zmq.Again:
            return False
        return True

    def _hear_orchestrator(self) -> None:
        for _ in range(BATCH):
            try:
                kind, *frames = receive(self._inside)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            match bytes(kind):
                case frames_of.OPEN if not self._endpoint:
                    self._open(bytes(frames[0]).decode())
                case frames_of.MESSAGE:
                    self._pass_out(bytes(frames[0]), frames[1:])

    def _tell_what_was_read(self) -> None:
        for _ in range(len(self._unread)):
            peer, size, trackers = self._unread.popleft()
            if not all(tracker.done for tracker in trackers) or not self._say(READ, peer, packed(size)):
                self._unread.append((peer, size, trackers))

    # -- peers ----------------------------------------------------------------------------------

    def _open(self, endpoint: str) -> None:
        """Listen; at the same port as before, if this is not the first door. BadRequest."""
        check_endpoint(endpoint, secured=self._secret is not None)
        inner = self._inside_endpoint.removeprefix("ipc://") + "-in"
        self._outside = router(
            self._context, f"ipc://{inner}", secret=self._secret, domain=self._role, largest=largest_frame(self._role),
            handover=self._role == "client",
        )  # fmt: skip
        self._poller.register(self._outside, zmq.POLLIN)
        self._listening = True
        self._endpoint, self._said_hello = self._front.listen(endpoint, inner), 0.0
        log.info("listening at %s", self._endpoint)

    def _listen_to_peers(self) -> None:
        """Wait for what peers say only while the orchestrator can hear it."""
        if self._outside is not None and self._listening != bool(self._inside.poll(0, zmq.POLLOUT)):
            self._listening = not self._listening
            if self._listening:
                self._poller.register(self._outside, zmq.POLLIN)
            else:
                self._poller.unregister(self._outside)

    def _hear_peers(self) -> None:
        if self._outside is None:
            return
        for _ in range(BATCH):
            if not self._inside.poll(0, zmq.POLLOUT):
                return  # the orchestrator has enough to do; the rest stays with those who sent it
            try:
                user, (identity, *frames) = receive_with_user(self._outside)
            except zmq.Again:
                return
            if self._may_pass(bytes(identity), user, frames):
                self._say(MESSAGE, identity, user.encode(), *frames)

    def _may_pass(self, peer: bytes, public: str, frames: list[Buffer]) -> bool:
        """Return whether a message is passed on: its key is let in, and it keeps to what a key may send."""
        entry = self._allowed.entry(public, self._role)
        name = entry.name if entry else ""
        if self._secret is not None:
            if entry is None or self._key_of.get(peer, public) != public:
                return False
            if peer.startswith(b"\0"):
                self._counted.warn(f"{name} gives its socket no identity, and could be taken for another")
                return False
            if self._role == "client" and not self._bucket(public).take():
                self._counted.warn(
                    f"{name} sends more than {MESSAGES_A_SECOND:g} messages a second; the rest is let go"
                )
                return False
        if len(frames) > MAX_TENSORS + 2 or size_of(frames) > LARGEST_MESSAGE[self._role]:
            self._counted.warn(f"{name} has sent a message of more than a message may hold; it is let go")
            self._forget(peer)
            return False
        own = self._peers.setdefault(public, OrderedDict())
        own[peer] = None
        own.move_to_end(peer)
        self._key_of[peer] = public
        if len(own) > REMEMBERED:
            self._forget(next(iter(own)))
        return True

    def _forget(self, peer: bytes) -> None:
        """Forget a peer; the orchestrator hears that it is gone."""
        self._peers.get(self._key_of.pop(peer, ""), OrderedDict()).pop(peer, None)
        self._say(GONE, peer)

    def _bucket(self, public: str) -> TokenBucket:
        return self._buckets.setdefault(public, TokenBucket(MESSAGES_A_SECOND, BURST))

    def _pass_out(self, peer: bytes, frames: list[Buffer]) -> None:
        """Send what the orchestrator says to a peer; where it can't be sent, the orchestrator hears that it is gone."""
        public = self._key_of.get(peer, "")
        let_in = self._secret is None or self._allowed.entry(public, self._role) is not None
        if self._outside is None or not let_in:
            self._forget(peer)
            return
        size = size_of(frames)
        try:
            if size < COUNTED_BYTES:
                send(self._outside, [peer, *frames])
            else:
                self._unread.append((peer, size, send_tracked(self._outside, [peer, *frames])))
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._forget(peer)

    def _turned_away(self, address: str) -> None:
        self._counted.warn(f"a {self._role} was not let in", f"at {address}")

    def _full(self) -> None:
        self._counted.warn(f"{self._connections} connections are open; new ones take the places of unproven ones")

    def _admit(self) -> None:
        """Answer libzmq's questions about peers that want to come in (ZAP, RFC 27): by key and role alone."""
        while True:
            try:
                version, number, _, _, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            public = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
            entry = self._allowed.entry(public, self._role)
            code, text = (b"200", b"OK") if entry else (b"400", b"not on the list of keys")
            self._zap.send_multipart([version, number, code, text, public.encode() if entry else b"", b""])


def limit_resources(role: DoorRole) -> int:
    """Take no more memory than a door needs, and as many files as it may; return how many connections those allow."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_BYTES[role]:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES[role], hard))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    return max(1, min(MOST_CONNECTIONS[role], (files - OWN_FILES) // 3))

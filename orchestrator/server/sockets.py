"""The orchestrator's sockets: private ones for this machine's user, and CURVE over TCP for keys that are let in.

A peer is known here by a byte for the socket that it came through and its socket's identity.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from orchestrator.access import AllowedKeys
from orchestrator.principal import LOCAL_USER, KeyHolder, Principal
from orchestrator.token_bucket import TokenBucket
from protocol.client.endpoints import Endpoints
from protocol.curve_keys import KeyPair, Role
from protocol.pictures import MAX_PIXELS, MAX_VIDEO_PIXELS
from protocol.sockets import receive_from, router, send
from protocol.tensors import Buffer

log = logging.getLogger(__name__)

ZAP = "inproc://zeromq.zap.01"
BATCH = 256  # messages of one socket between two commits
REMEMBERED = 10_000  # peers from outside
MESSAGES_A_SECOND, BURST = 200.0, 1000.0  # of one client's key
LARGEST_QUESTION = 3 * max(MAX_PIXELS, MAX_VIDEO_PIXELS) + (1 << 20)  # bytes of a frame: what a job may begin from
Handler = Callable[[bytes, Principal, list[Buffer]], None]  # (peer, on whose behalf, frames)


@dataclass(slots=True)
class BoundSocket:
    socket: "zmq.Socket[bytes]"
    role: Role
    guarded: bool  # by CURVE and the list of keys


class Sockets:
    def __init__(
        self, local: Endpoints, remote: Sequence[tuple[Role, str]], key: KeyPair | None, gate: AllowedKeys
    ) -> None:
        """`remote` are TCP endpoints; with a `key` they want CURVE, without it they must be on the loopback address."""
        self._gate = gate
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP)
        self._bound = [
            BoundSocket(router(self._context, local.clients, largest=LARGEST_QUESTION), "client", guarded=False),
            BoundSocket(router(self._context, local.workers), "worker", guarded=False),
        ]
        for role, endpoint in remote:
            largest = LARGEST_QUESTION if role == "client" else None
            bound = router(self._context, endpoint, secret=key.secret if key else None, domain=role, largest=largest)
            self._bound.append(BoundSocket(bound, role, guarded=key is not None))
        names = [bound.socket.getsockopt_string(zmq.LAST_ENDPOINT) for bound in self._bound]
        self.local = Endpoints(names[0], names[1])
        self.remote = [(bound.role, name) for bound, name in zip(self._bound[2:], names[2:], strict=True)]
        self._keys: OrderedDict[bytes, str] = OrderedDict()  # by peer, the public key that it came with
        self._buckets: dict[str, TokenBucket] = {}  # by public key
        self._poller = zmq.Poller()
        for socket in (self._zap, *(bound.socket for bound in self._bound)):
            self._poller.register(socket, zmq.POLLIN)

    def wait(self, milliseconds: int) -> None:
        self._poller.poll(milliseconds)

    def take(self, from_client: Handler, from_worker: Handler) -> None:
        """Hand on what has come, workers' words first."""
        self._admit()
        for role, handle in (("worker", from_worker), ("client", from_client)):
            for number, bound in enumerate(self._bound):
                if bound.role == role:
                    self._drain(number, bound, handle)

    def _drain(self, number: int, bound: BoundSocket, handle: Handler) -> None:
        for _ in range(BATCH):
            try:
                user, (identity, *frames) = receive_from(bound.socket)
            except zmq.Again:
                return
            peer = bytes([number]) + bytes(identity)
            if not bound.guarded:
                handle(peer, LOCAL_USER, frames)
            elif (name := self._name(peer, user, bound.role)) is not None:
                handle(peer, KeyHolder(name), frames)

    def _name(self, peer: bytes, public: str, role: Role) -> str | None:
        """Return the name of a message's key; None if it is not let in, or not so often."""
        entry = self._gate.entry(public, role)
        if entry is None:
            return None
        if role == "client" and not self._buckets.setdefault(public, TokenBucket(MESSAGES_A_SECOND, BURST)).take():
            return None
        self._keys[peer] = public
        self._keys.move_to_end(peer)
        if len(self._keys) > REMEMBERED:
            self._keys.popitem(last=False)
        return entry.name

    def send(self, peer: bytes, frames: Sequence[Buffer]) -> None:
        """Send as sockets.send does; to a peer whose key was revoked nothing goes."""
        bound = self._bound[peer[0]]
        if bound.guarded and self._gate.entry(self._keys.get(peer, ""), bound.role) is None:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        send(bound.socket, [peer[1:], *frames])

    def shut_out(self) -> list[bytes]:
        """The peers whose keys have been revoked since the last call."""
        if not self._gate.look_again():
            return []
        gone = [peer for peer, key in self._keys.items() if self._gate.entry(key, self._bound[peer[0]].role) is None]
        for peer in gone:
            self._buckets.pop(self._keys.pop(peer), None)
        return gone

    def _admit(self) -> None:
        """Answer libzmq's questions about peers that want to come in (ZAP, RFC 27): by key and role alone."""
        while True:
            try:
                version, number, domain, address, _, mechanism, *credentials = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            public = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
            entry = self._gate.entry(public, domain.decode(errors="replace"))  # type: ignore[arg-type]
            if entry is None:
                log.warning(
                    "a %s at %s was not let in", domain.decode(errors="replace"), address.decode(errors="replace")
                )
            code, text = (b"200", b"OK") if entry else (b"400", b"not on the list of keys")
            self._zap.send_multipart([version, number, code, text, public.encode() if entry else b"", b""])

    def close(self) -> None:
        for bound in self._bound:
            bound.socket.close()
        self._zap.close()
        self._context.term()

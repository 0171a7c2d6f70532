"""ZeroMQ sockets with every default that hurts set to something that doesn't (design: private, local, bounded)."""

import ipaddress
import secrets
import urllib.parse
from collections.abc import Sequence

import zmq

from protocol.curve_keys import PeerKey
from protocol.errors import BadRequest
from protocol.tensors import Buffer
from protocol.wire import MAX_FRAME_BYTES

HIGH_WATER = 2000  # messages a peer, each way
LINGER_MS = 500  # what a closing socket may still take to send its last words
KEEPALIVE_SECONDS = 1  # of silence, after which TCP asks whether a link's other end is there, and between questions
UNTAKEN_MS = 4000  # that the other end may not take what was sent or asked until the link drops (Linux)
PROBES = 3  # questions without an answer, where that time can't be set
HANDSHAKE_MS = 10_000  # that a peer has to prove who it is
MORE, LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)
COPY_BELOW = 65536  # bytes; zero-copy pays above this


def configure(socket: zmq.Socket[bytes], largest: int | None = None, high_water: int = HIGH_WATER) -> None:
    """Set the options that every socket has; `largest` in bytes of a frame that may come.

    TCP looks for dead links, not ZeroMQ's own heartbeats: with those libzmq 4.3.5 ends its process when a peer sends
    more than is read and then goes (libzmq issue 4364).
    """
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.RCVHWM, high_water)
    socket.setsockopt(zmq.MAXMSGSIZE, largest or MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, PROBES)
    socket.setsockopt(zmq.TCP_MAXRT, UNTAKEN_MS)
    socket.setsockopt(zmq.IMMEDIATE, 1)


def router(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    secret: str | None = None,
    domain: str = "",
    largest: int | None = None,
    high_water: int = HIGH_WATER,
    handover: bool = False,
) -> zmq.Socket[bytes]:
    """A bound ROUTER: it knows when a peer is gone, and nobody takes over another's identity.

    With `handover` a peer takes over its own, which nobody else knows, from a connection that is dead and not yet
    given up: else it would be heard by nobody.
    With a `secret` key it wants CURVE, and the ZAP handler of the `domain` decides which peers come in.
    BadRequest if the endpoint can't be bound, or is not on this machine and has no key.
    """
    check_endpoint(endpoint, secured=secret is not None)
    socket = context.socket(zmq.ROUTER)
    configure(socket, largest, high_water)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, int(handover))
    if secret is not None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise BadRequest(f"Nothing can listen at {endpoint!r}: {error.strerror}.", "Choose another port.") from error
    return socket


def new_identity() -> bytes:
    """A name for one incarnation of a peer; ZeroMQ keeps those that begin with a zero byte for itself."""
    return b"T" + secrets.token_bytes(15)


def dealer(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    identity: bytes,
    key: PeerKey | None = None,
    high_water: int = HIGH_WATER,
) -> zmq.Socket[bytes]:
    """A connected DEALER; `identity` is new for every incarnation."""
    check_endpoint(endpoint, secured=key is not None)
    socket = context.socket(zmq.DEALER)
    configure(socket, high_water=high_water)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    if key is not None:
        socket.setsockopt_string(zmq.CURVE_SERVERKEY, key.server)
        socket.setsockopt_string(zmq.CURVE_PUBLICKEY, key.public)
        socket.setsockopt_string(zmq.CURVE_SECRETKEY, key.secret)
    socket.connect(endpoint)
    return socket


def is_loopback(endpoint: str) -> bool | None:
    """Return whether a TCP endpoint is on the loopback address; None if it is no TCP endpoint."""
    try:
        address = urllib.parse.urlsplit(endpoint)
        host, port = address.hostname or "", address.port
    except ValueError:
        return None
    if address.scheme != "tcp" or not host or port is None:
        return None
    return is_loopback_host(host)


def is_loopback_host(host: str) -> bool:
    """Return whether a host's name or address is this machine's own alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(endpoint: str, secured: bool = False) -> None:
    """Refuse all but ipc and TCP, and without keys all but the loopback address, where no stranger knocks."""
    if endpoint.startswith(("ipc://", "inproc://")) and len(endpoint) > 9:
        return
    match is_loopback(endpoint):
        case None:
            raise BadRequest(f"{endpoint!r} is not an endpoint.", "Use ipc://PATH or tcp://HOST:PORT.")
        case False if not secured:
            raise BadRequest(
                f"The endpoint {endpoint!r} is not on this machine, and there is no key for it.",
                "Make one on the stack's host with 'triptych keys new NAME', or use tcp://127.0.0.1:PORT.",
            )


def receive(socket: zmq.Socket[bytes]) -> list[Buffer]:
    """Receive a multipart message without waiting; big frames are views of ZeroMQ's own memory. zmq.Again if none."""
    return buffers_of(socket.recv_multipart(flags=zmq.NOBLOCK, copy=False))


def buffers_of(frames: Sequence[zmq.Frame]) -> list[Buffer]:
    """Return frames' data: of big ones views of ZeroMQ's own memory."""
    return [frame.buffer if len(frame.buffer) >= COPY_BELOW else frame.bytes for frame in frames]


def send(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> None:
    """Send without waiting. zmq.Again: the peer's queue is full; zmq.ZMQError EHOSTUNREACH: it is gone."""
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        socket.send(frame, flags=MORE if i < last else LAST, copy=len(frame) < COPY_BELOW)

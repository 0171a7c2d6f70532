"""ZeroMQ sockets with every default that hurts set to something that doesn't (design: private, local, bounded)."""

import ipaddress
import secrets
import urllib.parse
from collections.abc import Sequence

import zmq

from protocol.errors import BadRequest
from protocol.tensors import Buffer
from protocol.wire import MAX_FRAME_BYTES

HIGH_WATER = 2000  # messages a peer, each way
LINGER_MS = 500  # what a closing socket may still take to send its last words
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 500, 1500  # a dead link drops after 2 s
MORE, LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)
COPY_BELOW = 65536  # bytes; zero-copy pays above this


def configure(socket: zmq.Socket[bytes]) -> None:
    """The options that every socket has."""
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.IMMEDIATE, 1)


def router(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """A bound ROUTER: it knows when a peer is gone, and nobody takes over another's identity."""
    check_endpoint(endpoint)
    socket = context.socket(zmq.ROUTER)
    configure(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    socket.bind(endpoint)
    return socket


def new_identity() -> bytes:
    """A name for one incarnation of a peer; ZeroMQ keeps those that begin with a zero byte for itself."""
    return b"T" + secrets.token_bytes(15)


def dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: bytes) -> zmq.Socket[bytes]:
    """A connected DEALER; `identity` is new for every incarnation."""
    check_endpoint(endpoint)
    socket = context.socket(zmq.DEALER)
    configure(socket)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
    socket.connect(endpoint)
    return socket


def check_endpoint(endpoint: str) -> None:
    """Refuse all but ipc and TCP on the loopback address, where nobody else can listen or knock."""
    if endpoint.startswith(("ipc://", "inproc://")) and len(endpoint) > 9:
        return
    address = urllib.parse.urlsplit(endpoint)
    try:
        host, port = address.hostname or "", address.port
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback, port = False, None
    if address.scheme != "tcp" or not loopback or port is None:
        raise BadRequest(
            f"The endpoint {endpoint!r} is not local.",
            "Use ipc://PATH or tcp://127.0.0.1:PORT: links are not encrypted.",
        )


def receive(socket: zmq.Socket[bytes]) -> list[Buffer]:
    """One multipart message without waiting; big frames are views of ZeroMQ's own memory. zmq.Again if none."""
    frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
    return [frame.buffer if len(frame.buffer) >= COPY_BELOW else frame.bytes for frame in frames]


def send(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> None:
    """Send without waiting. zmq.Again: the peer's queue is full; zmq.ZMQError EHOSTUNREACH: it is gone."""
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        socket.send(frame, flags=MORE if i < last else LAST, copy=len(frame) < COPY_BELOW)

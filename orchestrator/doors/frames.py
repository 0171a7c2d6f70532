"""Frames between a door and the orchestrator: what peers say and hear, and what the two have to say to each other.

From a door: MESSAGE, peer, public key, frames …; READ, peer, bytes; GONE, peer; HELLO, endpoint, process number.
To a door: MESSAGE, peer, frames …; OPEN, endpoint; BEAT. A peer is known by its socket's identity.
"""

import struct
from collections.abc import Sequence

import zmq

from protocol.curve_keys import DoorRole
from protocol.pictures import MAX_PIXELS, MAX_VIDEO_PIXELS
from protocol.sockets import LAST, MORE, buffers_of
from protocol.tensors import Buffer
from protocol.wire import MAX_FRAME_BYTES

MESSAGE, READ, GONE, HELLO, OPEN, BEAT = b"m", b"r", b"g", b"h", b"o", b"b"
COUNTED_BYTES = 1024  # of an answer, from which on its sender hears when it has been read
HELLO_SECONDS = 0.5
HIGH_WATER = 50_000  # messages between a door and the orchestrator, each way: those of all its peers
LARGEST_QUESTION = 3 * max(MAX_PIXELS, MAX_VIDEO_PIXELS) + (1 << 20)  # bytes of a frame: what a job may begin from


def largest_frame(role: DoorRole) -> int:
    """Return the bytes that one frame from a role's peers may have."""
    return LARGEST_QUESTION if role == "client" else MAX_FRAME_BYTES


def size_of(frames: Sequence[Buffer]) -> int:
    return sum(map(len, frames))


def packed(size: int) -> bytes:
    return struct.pack("<Q", size)


def unpacked(data: Buffer) -> int:
    return int(struct.unpack("<Q", data)[0])


def receive_with_user(socket: zmq.Socket[bytes]) -> tuple[str, list[Buffer]]:
    """Receive a message without waiting, with the user that ZAP has named; empty without CURVE. zmq.Again if none."""
    frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
    try:
        user = str(frames[-1].get("User-Id"))
    except zmq.ZMQError:
        user = ""
    return user, buffers_of(frames)


def send_tracked(socket: zmq.Socket[bytes], frames: Sequence[Buffer]) -> list[zmq.MessageTracker]:
    """Send as sockets.send does; return trackers that are done when libzmq holds none of the frames any more."""
    socket.copy_threshold = 0
    flags = [MORE] * (len(frames) - 1) + [LAST]
    return [socket.send(frame, flags=flag, copy=False, track=True) for frame, flag in zip(frames, flags, strict=True)]

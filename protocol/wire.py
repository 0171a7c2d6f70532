"""Messages to frames and back: [version and kind, msgpack header, raw tensor frames …].

Decoding checks everything before it allocates anything: limits first, then the header's types, then each tensor's
size against its frame. What is wrong becomes a ProtocolError, whatever the bytes; nothing received is executed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgpack
from pydantic import ValidationError

from protocol.errors import ProtocolError, VersionMismatch
from protocol.messages import EVERY_MESSAGE
from protocol.messages.common import Message
from protocol.tensors import Buffer, Tensor, checked

VERSION = 1
MAX_KIND_BYTES = 32
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 256
MAX_FRAME_BYTES = 256 << 20
MAX_DEPTH = 8

KINDS: dict[bytes, type[Message]] = {cls.kind.encode(): cls for cls in EVERY_MESSAGE}


@dataclass(frozen=True, slots=True)
class Envelope:
    message: Message
    tensors: tuple[Tensor, ...] = ()

    def tensor(self, name: str) -> Tensor | None:
        return next((t for t in self.tensors if t.name == name), None)


def encode(message: Message, tensors: Sequence[Tensor] = ()) -> list[Buffer]:
    """Frames to send. The tensors' data is not copied: leave it alone until it is sent."""
    header = {"fields": message.model_dump(exclude_defaults=True), "tensors": [t.spec for t in tensors]}
    return [bytes([VERSION]) + message.kind.encode(), msgpack.packb(header), *(t.data for t in tensors)]


def decode(frames: Sequence[Buffer], allowed: Iterable[type[Message]] = EVERY_MESSAGE) -> Envelope:
    """The message in received frames.

    Raises:
        VersionMismatch: the peer speaks another version.
        ProtocolError: anything else that is not exactly a message of an allowed kind.
    """
    if len(frames) < 2 or len(frames) > 2 + MAX_TENSORS:
        raise ProtocolError(f"A message has 2 to {2 + MAX_TENSORS} frames; {len(frames)} came.")
    cls = _kind(bytes(frames[0][: MAX_KIND_BYTES + 2]))
    if cls not in allowed:
        raise ProtocolError(f"A message of kind {cls.kind!r} is not taken here.")
    fields, specs = _header(frames[1])
    if len(specs) != len(frames) - 2:
        raise ProtocolError(f"The header names {len(specs)} tensors; {len(frames) - 2} frames came.")
    for frame in frames[2:]:
        if len(frame) > MAX_FRAME_BYTES:
            raise ProtocolError(f"A frame of {len(frame)} bytes came; at most {MAX_FRAME_BYTES} are taken.")
    tensors = tuple(checked(spec, frame) for spec, frame in zip(specs, frames[2:], strict=True))
    try:
        return Envelope(cls.model_validate(fields), tensors)
    except ValidationError as error:
        raise ProtocolError(f"A message of kind {cls.kind!r} is not valid: {_first_fault(error)}.") from error


def number_in(frames: Sequence[Buffer]) -> int:
    """Return the number of a question that can't be taken, as far as its header can be read; else 0."""
    try:
        number = _header(frames[1])[0].get("request", 0)
    except (ProtocolError, IndexError):
        return 0
    return number if type(number) is int and 0 <= number < 2**53 else 0


def _kind(first: bytes) -> type[Message]:
    if not first:
        raise ProtocolError("The first frame is empty; it should hold the version and the kind.")
    if first[0] != VERSION:
        raise VersionMismatch(
            f"A peer speaks protocol version {first[0]}; this is version {VERSION}.",
            "Use the same release of Triptych on both sides.",
        )
    cls = KINDS.get(first[1:])
    if cls is None:
        raise ProtocolError(f"Unknown kind of message: {first[1 : 1 + MAX_KIND_BYTES]!r}.")
    return cls


def _header(frame: Buffer) -> tuple[dict[str, object], tuple[object, ...]]:
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"A header of {len(frame)} bytes came; at most {MAX_HEADER_BYTES} are taken.")
    try:
        header = msgpack.unpackb(frame, use_list=False, max_ext_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError("A header is not valid msgpack.") from error
    match header:
        case {"fields": dict(fields), "tensors": tuple(specs), **rest} if not rest and _depth_within(fields, MAX_DEPTH):
            return fields, specs
    raise ProtocolError("A header is not a map of fields and tensors, or it nests too deeply.")


def _depth_within(value: object, levels: int) -> bool:
    if not isinstance(value, dict | tuple):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_depth_within(item, levels - 1) for item in inner)


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, fault['loc']))[:200]}: {fault['msg']}"

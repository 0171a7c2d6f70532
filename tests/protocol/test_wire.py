"""Every message and dtype survives the wire; whatever else arrives is a clean ProtocolError."""

import contextlib
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import wire
from protocol.errors import ProtocolError, TriptychError, VersionMismatch
from protocol.messages import EVERY_MESSAGE
from protocol.messages.client import FROM_CLIENT, Submit
from protocol.messages.common import Heartbeat, Message
from protocol.messages.worker import Ready
from protocol.tensors import ITEMSIZE, Tensor
from tests.chance import examples
from tests.protocol.strategies import messages, tensors


def frame(fields: Any, specs: Any = ()) -> bytes:
    return bytes(msgpack.packb({"fields": fields, "tensors": specs}))


@pytest.mark.parametrize("cls", EVERY_MESSAGE, ids=lambda cls: cls.kind)
@examples(25)
@given(data=st.data())
def test_every_message_survives_the_wire(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(cls))
    sent = data.draw(st.lists(tensors(), max_size=3))
    frames = wire.encode(message, sent)
    received = wire.decode([bytes(part) for part in frames])
    assert received.message == message
    assert [(t.spec, bytes(t.data)) for t in received.tensors] == [(t.spec, bytes(t.data)) for t in sent]


@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_every_dtype_survives_torch_and_the_wire(dtype: str) -> None:
    import torch

    from workers.tensors import DTYPES, from_wire, to_wire

    raw = torch.arange(24 * 8, dtype=torch.uint8)[: 24 * ITEMSIZE[dtype]]
    original = (raw % 2).view(torch.bool) if dtype == "bool" else raw.view(DTYPES[dtype])
    original = original.reshape(2, 3, 4).transpose(0, 2)
    frames = wire.encode(Ready(), [to_wire("x", original)])
    (received,) = wire.decode([bytes(part) for part in frames]).tensors
    back = from_wire(received)
    assert back.dtype == original.dtype
    assert back.shape == original.shape
    assert torch.equal(back.contiguous().view(torch.uint8), original.contiguous().view(torch.uint8))


@examples(300)
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_random_frames_are_a_clean_error(frames: list[bytes]) -> None:
    with pytest.raises(TriptychError):
        wire.decode(frames)


@examples(300)
@given(data=st.data())
def test_damaged_messages_decode_or_are_a_clean_error(data: st.DataObject) -> None:
    frames = [
        bytearray(part) for part in wire.encode(data.draw(messages(Submit)), data.draw(st.lists(tensors(), max_size=2)))
    ]
    which = data.draw(st.integers(0, len(frames) - 1))
    if frames[which]:
        at = data.draw(st.integers(0, len(frames[which]) - 1))
        if data.draw(st.booleans()):
            frames[which][at] = data.draw(st.integers(0, 255))
        else:
            del frames[which][at:]
    with contextlib.suppress(TriptychError):
        wire.decode([bytes(part) for part in frames], FROM_CLIENT)


HOSTILE: dict[str, list[bytes]] = {
    "no frames": [],
    "one frame": [b"\x01ready"],
    "empty kind": [b"", frame({})],
    "unknown kind": [b"\x01__class__", frame({})],
    "kind with a path": [b"\x01../../etc/passwd", frame({})],
    "unknown field": [b"\x01ready", frame({"__init__": 1})],
    "wrong type": [b"\x01heartbeat", frame({"rss_bytes": "1", "gpu_bytes": 0})],
    "bool for a number": [b"\x01heartbeat", frame({"rss_bytes": True, "gpu_bytes": 0})],
    "negative count": [b"\x01heartbeat", frame({"rss_bytes": -1, "gpu_bytes": 0})],
    "missing field": [b"\x01heartbeat", frame({"rss_bytes": 1})],
    "not a map": [b"\x01ready", msgpack.packb([1, 2])],
    "extra header entry": [b"\x01ready", msgpack.packb({"fields": {}, "tensors": [], "more": 1})],
    "truncated header": [b"\x01ready", frame({})[:-3]],
    "trailing bytes": [b"\x01ready", frame({}) + b"x"],
    "giant string length": [b"\x01ready", b"\xdb\xff\xff\xff\xff"],
    "giant array length": [b"\x01ready", b"\xdd\xff\xff\xff\xff"],
    "giant map length": [b"\x01ready", b"\xdf\xff\xff\xff\xff"],
    "extension type": [b"\x01ready", msgpack.packb(msgpack.ExtType(1, b"x" * 10))],
    "deep nesting": [b"\x01ready", b"\x91" * 100_000 + b"\x90"],
    "deep fields": [b"\x01ready", frame({"device_map": [[[[[[[[[[]]]]]]]]]]})],
    "number keys": [b"\x01ready", msgpack.packb({"fields": {1: 2}, "tensors": []})],
    "tensor without a frame": [b"\x01ready", frame({}, [["x", "uint8", [4]]])],
    "frame without a tensor": [b"\x01ready", frame({}), b"xxxx"],
    "lying size": [b"\x01ready", frame({}, [["x", "float32", [1024, 1024]]]), b"xxxx"],
    "frame too long": [b"\x01ready", frame({}, [["x", "uint8", [3]]]), b"xxxx"],
    "overflowing shape": [b"\x01ready", frame({}, [["x", "uint8", [2**62, 2**62, 2**62]]]), b"xxxx"],
    "negative shape": [b"\x01ready", frame({}, [["x", "uint8", [-2, -2]]]), b"xxxx"],
    "bool shape": [b"\x01ready", frame({}, [["x", "uint8", [True, 4]]]), b"xxxx"],
    "too many dimensions": [b"\x01ready", frame({}, [["x", "uint8", [1] * 9]]), b"x"],
    "unknown dtype": [b"\x01ready", frame({}, [["x", "object", [4]]]), b"xxxx"],
    "no name": [b"\x01ready", frame({}, [["", "uint8", [4]]]), b"xxxx"],
    "too many tensors": [b"\x01ready", frame({}, [["x", "uint8", [0]]] * 257), *[b""] * 257],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_input_is_a_clean_error_and_allocates_little(case: str) -> None:
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        wire.decode(HOSTILE[case])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000


def test_another_version_is_told_so() -> None:
    frames = wire.encode(Heartbeat(rss_bytes=1, gpu_bytes=0))
    frames[0] = b"\x02" + bytes(frames[0][1:])
    with pytest.raises(VersionMismatch, match="version 2"):
        wire.decode(frames)


def test_a_kind_of_the_other_side_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not taken here"):
        wire.decode(wire.encode(Ready()), FROM_CLIENT)


def test_a_header_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        wire.decode([b"\x01ready", bytes(wire.MAX_HEADER_BYTES + 1)])


def test_a_tensor_is_opaque_bytes() -> None:
    tensor = Tensor("x", "bfloat16", (2,), b"\x01\x02\x03\x04")
    (received,) = wire.decode(wire.encode(Ready(), [tensor])).tensors
    assert received == tensor

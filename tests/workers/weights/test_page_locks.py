"""Weights of which memory can't hold all: some are page-locked, the others come from the disk."""

import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.workers.worst_stream import WorstCopyStream
from workers.errors import WeightsLost
from workers.weights.copy_stream import HostCopyStream, ThreadedCopyStream
from workers.weights.direct_file import DirectFile, new_buffer
from workers.weights.host_weights import HostWeights, host_weights
from workers.weights.page_locks import COPIES_BEFORE, PageLocker, PageLocks

CPU = torch.device("cpu")
PIECE = 64 << 10


class Weights(torch.nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))


@pytest.fixture
def weights(tmp_path: Path) -> HostWeights:
    """Sixteen tensors of odd sizes in one file."""
    path = tmp_path / "model.safetensors"
    save_file({f"w{i}": torch.randn(9_001 + 37 * i) for i in range(16)}, path)
    return host_weights(Weights(load_file(path)), "weights")


def read_all(locks: PageLocks, weights: HostWeights) -> tuple[int, int]:
    """Copy every weight as a copy stream does; return how many bytes came from locked memory, and from the disk."""
    buffer, locked, read = new_buffer(PIECE, pinned=False), 0, 0
    for tensor in weights.tensors.values():
        flat = tensor.view(torch.uint8)
        for part in locks.parts(tensor):
            wanted = flat[part.start : part.end]
            if part.locked:
                locked += wanted.nbytes
                continue
            assert part.file is not None
            assert torch.equal(part.file.read(buffer, part.offset, wanted.nbytes), wanted)
            read += wanted.nbytes
    return locked, read


@pytest.mark.parametrize("room", [0, 3, 100])
def test_what_is_copied_again_is_locked_as_far_as_memory_allows(weights: HostWeights, room: int) -> None:
    locked: list[int] = []

    def register(address: int, size: int, device: torch.device) -> int:
        locked.append(size)
        return 0

    locker = PageLocker(register, piece_bytes=PIECE, limit=room * PIECE)
    locker.lock_ahead([Path(path) for path in weights.files], CPU)
    locks = PageLocks(weights, CPU, locker)
    assert locks.limited
    total = sum(tensor.nbytes for tensor in weights.tensors.values())
    assert read_all(locks, weights) == (0, total)
    assert not locked
    for _ in range(COPIES_BEFORE):
        read_all(locks, weights)  # which asks for some of it to be locked
    wait([locker.thread.submit(int)])
    in_memory, from_disk = read_all(locks, weights)
    assert in_memory + from_disk == total
    assert sum(locked) <= room * PIECE
    assert len(locked) >= min(room, total // PIECE)
    assert (in_memory > 0) == (room > 0)
    assert (from_disk > 0) == (room < 100)


def test_what_is_said_to_be_copied_again_and_again_is_locked_sooner(weights: HostWeights) -> None:
    locked: list[int] = []

    def register(address: int, size: int, device: torch.device) -> int:
        locked.append(size)
        return 0

    locker = PageLocker(register, PIECE, limit=100 * PIECE)
    locks = PageLocks(weights, CPU, locker)
    first = list(weights.tensors.values())[:4]
    locks.expect(first)
    read_all(locks, weights)
    assert 0 < sum(locked) <= sum(tensor.nbytes for tensor in first) + 2 * PIECE
    assert all(part.locked for tensor in first[1:3] for part in locks.parts(tensor))


def test_what_is_copied_in_every_step_gets_the_room_of_what_is_not(weights: HostWeights) -> None:
    locked: dict[int, int] = {}  # bytes by address

    def register(address: int, size: int, device: torch.device) -> int:
        locked[address] = size
        return 0

    def unregister(address: int, device: torch.device) -> int:
        del locked[address]
        return 0

    tensors = list(weights.tensors.values())
    locker = PageLocker(register, PIECE, limit=4 * PIECE, unregister=unregister)
    locks = PageLocks(weights, CPU, locker)
    locks.expect(tensors)  # more than fits, as before a job was learned from
    read_all(locks, weights)
    first = {*locked}
    assert sum(locked.values()) <= 4 * PIECE
    locks.expect(tensors[-4:])
    for _ in range(2):
        in_memory, _ = read_all(locks, weights)
        assert sum(locked.values()) <= 4 * PIECE
    assert all(part.locked for tensor in tensors[-3:] for part in locks.parts(tensor))
    assert in_memory >= sum(tensor.nbytes for tensor in tensors[-3:])
    assert not first & {*locked}


def test_parts_of_a_model_in_one_file_do_not_unlock_each_others_pieces(weights: HostWeights) -> None:
    tensors = list(weights.tensors.values())
    locker = PageLocker(lambda *_: 0, PIECE, limit=4 * PIECE, unregister=lambda *_: 0)
    one, other = PageLocks(weights, CPU, locker), PageLocks(weights, CPU, locker)
    one.expect(tensors[:6])
    read_all(one, weights)
    held = [part.locked for tensor in tensors[:6] for part in one.parts(tensor)]
    assert any(held)
    other.expect(tensors[6:])
    read_all(other, weights)
    assert [part.locked for tensor in tensors[:6] for part in one.parts(tensor)] == held
    one.expect(())
    read_all(other, weights)
    assert not any(part.locked for tensor in tensors[1:5] for part in one.parts(tensor))


def test_what_can_not_be_locked_takes_nothing_of_the_limit(weights: HostWeights, tmp_path: Path) -> None:
    refused = {file.data_ptr() for file in weights.files.values()}
    locker = PageLocker(lambda address, *_: 1 if address in refused else 0, PIECE, limit=4 * PIECE)
    locks = PageLocks(weights, CPU, locker)
    locks.expect(weights.tensors.values())
    read_all(locks, weights)
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.randn(PIECE)}, path)
    other = host_weights(Weights(load_file(path)), "other")
    more = PageLocks(other, CPU, locker)
    more.expect(other.tensors.values())
    in_memory, _ = read_all(more, other)
    assert in_memory > PIECE


def test_a_file_is_read_at_any_place_and_its_end_is_an_error(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (50_001,), dtype=torch.uint8)
    path = tmp_path / "file"
    path.write_bytes(data.numpy().tobytes())
    file, buffer = DirectFile(str(path)), new_buffer(20_000, pinned=False)
    for offset, size in ((0, 1), (4095, 2), (4096, 4096), (12_345, 20_000), (49_000, 1_001)):
        assert torch.equal(file.read(buffer, offset, size), data[offset : offset + size])
    with pytest.raises(OSError, match="ends before"):
        file.read(buffer, 49_000, 1_002)
    file._direct = False  # as where a file system knows no direct reads
    assert torch.equal(file.read(buffer, 123, 4_567), data[123:4_690])


def test_copies_of_a_thread_come_in_order_and_tell_what_failed() -> None:
    stream = ThreadedCopyStream(WorstCopyStream(CPU))
    place, held = torch.zeros(4), threading.Event()
    stream._thread.submit(held.wait)
    first = stream.copy([(place, torch.ones(4))], stream.mark())
    second = stream.copy([(place, torch.full((4,), 2.0))], stream.mark())
    held.set()
    stream.wait(second)
    assert torch.equal(place, torch.full((4,), 2.0))
    stream.wait(first)
    assert torch.equal(place, torch.full((4,), 2.0))
    failing = ThreadedCopyStream(HostCopyStream(CPU))
    mark = failing.copy([(place, torch.ones(5))], failing.mark())
    later = failing.copy([(place, torch.ones(4))], failing.mark())
    for wait_for in (lambda: failing.wait(mark), lambda: failing.wait(later), failing.synchronize):
        with pytest.raises(WeightsLost):  # also where somebody waits for another one: its place is in use
            wait_for()

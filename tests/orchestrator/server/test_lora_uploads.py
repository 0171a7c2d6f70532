"""LoRAs that clients send, in parts."""

import hashlib
import os
from pathlib import Path

import pytest

from orchestrator.principal import LOCAL_USER, KeyHolder, Principal
from orchestrator.server import lora_uploads
from orchestrator.server.lora_uploads import LoraUploads
from protocol.errors import BadRequest, NotFound, QueueFull
from protocol.lora import MAX_LORA_BYTES, LoraRequest

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()
ALICE, BOB = KeyHolder("alice"), KeyHolder("bob")


def send(uploads: LoraUploads, who: Principal, data: bytes, part: int = 1000) -> int:
    digest = hashlib.sha256(data).hexdigest()
    have = uploads.offer(who, digest, len(data), set)
    while have < len(data):
        have = uploads.put(who, digest, have, data[have : have + part])
    return have


def test_a_file_comes_in_parts_and_is_kept_by_its_digest(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    assert send(uploads, ALICE, DATA) == len(DATA)
    assert (tmp_path / f"{DIGEST}.safetensors").read_bytes() == DATA
    assert uploads.offer(ALICE, DIGEST, len(DATA), set) == len(DATA)
    assert uploads.offer(LOCAL_USER, DIGEST, len(DATA), set) == len(DATA)
    assert uploads.offer(BOB, DIGEST, len(DATA), set) == 0  # who learns nothing of what others have sent
    assert send(uploads, BOB, DATA) == len(DATA)
    assert not list(tmp_path.glob("*.part"))


def test_parts_that_come_twice_or_out_of_turn_change_nothing(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    uploads.offer(ALICE, DIGEST, len(DATA), set)
    assert uploads.put(ALICE, DIGEST, 0, DATA[:1000]) == 1000
    assert uploads.put(ALICE, DIGEST, 0, DATA[:1000]) == 1000
    assert uploads.put(ALICE, DIGEST, 5000, DATA[5000:]) == 1000
    assert uploads.put(BOB, DIGEST, 1000, DATA[1000:]) == 0  # who has offered nothing
    assert uploads.put(ALICE, DIGEST, 1000, DATA[1000:]) == len(DATA)


def test_what_is_not_what_was_offered_is_refused(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    with pytest.raises(BadRequest, match="too large"):
        uploads.offer(ALICE, DIGEST, MAX_LORA_BYTES + 1, set)
    uploads.offer(ALICE, DIGEST, len(DATA), set)
    with pytest.raises(BadRequest, match="not those of its digest"):
        uploads.put(ALICE, DIGEST, 0, bytes(len(DATA)))
    uploads.offer(ALICE, DIGEST, len(DATA), set)
    with pytest.raises(BadRequest, match="More bytes"):
        uploads.put(ALICE, DIGEST, 0, DATA + b"x")
    assert not list(tmp_path.iterdir())


def test_a_key_sends_two_at_once_at_most_until_they_are_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    for digest in ("a" * 64, "b" * 64):
        uploads.offer(ALICE, digest, 10, set)
    with pytest.raises(QueueFull):
        uploads.offer(ALICE, "c" * 64, 10, set)
    uploads.offer(BOB, "c" * 64, 10, set)
    monkeypatch.setattr(lora_uploads, "IDLE_SECONDS", -1.0)
    assert uploads.offer(ALICE, "d" * 64, 10, set) == 0
    assert len(list(tmp_path.glob("*.part"))) == 1
    LoraUploads(tmp_path, 10**9)
    uploads.close()
    assert not list(tmp_path.glob("*.part"))  # of an orchestrator that is gone


def test_the_oldest_go_first_but_for_links_and_what_is_needed(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 2 * len(DATA))
    files = [DATA[n:] + DATA[:n] for n in range(1, 5)]
    digests = [hashlib.sha256(data).hexdigest() for data in files]
    (tmp_path / f"{'f' * 64}.safetensors").symlink_to(tmp_path / "elsewhere")
    for age, data in enumerate(files[:3]):
        have = uploads.offer(ALICE, digests[age], len(data), lambda: {digests[0]})
        assert uploads.put(ALICE, digests[age], have, data) == len(data)
        os.utime(tmp_path / f"{digests[age]}.safetensors", (1000 + age, 1000 + age))
    assert {path.stem for path in tmp_path.iterdir()} == {digests[0], digests[2], "f" * 64}
    with pytest.raises(NotFound, match="is not here"):
        uploads.check(ALICE, [LoraRequest(name="x", digest=digests[1])])
    with pytest.raises(QueueFull, match="unfinished jobs"):
        uploads.offer(ALICE, digests[3], len(files[3]), lambda: {digests[0], digests[2]})


def test_a_key_names_only_what_it_has_sent(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    asked = [LoraRequest(name="mine", digest=DIGEST), LoraRequest(name="alias")]
    send(uploads, ALICE, DATA)
    uploads.check(ALICE, asked)
    uploads.check(LOCAL_USER, asked)
    with pytest.raises(NotFound, match="'mine' is not here"):
        uploads.check(BOB, asked)


def test_a_link_is_not_touched_and_counts_as_nothing(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(DATA)
    os.utime(theirs, (1000, 1000))
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / f"{DIGEST}.safetensors").symlink_to(theirs)
    uploads = LoraUploads(shelf, 10**9)
    assert uploads.offer(LOCAL_USER, DIGEST, len(DATA), set) == 0
    assert send(uploads, LOCAL_USER, DATA) == len(DATA)
    assert not (shelf / f"{DIGEST}.safetensors").is_symlink()
    assert theirs.stat().st_mtime == 1000


def test_a_disk_that_is_nearly_full_takes_nothing_more(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9, floor=1 << 60)
    with pytest.raises(QueueFull, match="no room"):
        uploads.offer(LOCAL_USER, DIGEST, len(DATA), set)


def test_parts_are_read_for_workers(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    send(uploads, ALICE, DATA)
    assert uploads.part(DIGEST, 5) == (len(DATA), DATA[5:])
    assert uploads.part("0" * 64, 0) == (0, b"")

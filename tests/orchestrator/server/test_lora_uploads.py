"""LoRAs that clients send, in parts."""

import hashlib
import os
from pathlib import Path

import pytest

from orchestrator.principal import LOCAL_USER, KeyHolder, Principal
from orchestrator.server import lora_uploads
from orchestrator.server.lora_uploads import LoraUploads
from protocol.errors import BadRequest, QueueFull
from protocol.lora import MAX_LORA_BYTES

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()
ALICE, BOB = KeyHolder("alice"), KeyHolder("bob")


def send(uploads: LoraUploads, who: Principal, data: bytes, part: int = 1000) -> int:
    digest = hashlib.sha256(data).hexdigest()
    have = uploads.offer(who, digest, len(data))
    while have < len(data):
        have = uploads.put(who, digest, have, data[have : have + part], ())
    return have


def test_a_file_comes_in_parts_and_is_kept_by_its_digest(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    assert send(uploads, ALICE, DATA) == len(DATA)
    assert (tmp_path / f"{DIGEST}.safetensors").read_bytes() == DATA
    assert uploads.offer(ALICE, DIGEST, len(DATA)) == len(DATA)
    assert uploads.offer(LOCAL_USER, DIGEST, len(DATA)) == len(DATA)
    assert uploads.offer(BOB, DIGEST, len(DATA)) == 0  # who learns nothing of what others have sent
    assert send(uploads, BOB, DATA) == len(DATA)
    assert not list(tmp_path.glob("*.part"))


def test_parts_that_come_twice_or_out_of_turn_change_nothing(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    uploads.offer(ALICE, DIGEST, len(DATA))
    assert uploads.put(ALICE, DIGEST, 0, DATA[:1000], ()) == 1000
    assert uploads.put(ALICE, DIGEST, 0, DATA[:1000], ()) == 1000
    assert uploads.put(ALICE, DIGEST, 5000, DATA[5000:], ()) == 1000
    assert uploads.put(BOB, DIGEST, 1000, DATA[1000:], ()) == 0  # who has offered nothing
    assert uploads.put(ALICE, DIGEST, 1000, DATA[1000:], ()) == len(DATA)


def test_what_is_not_what_was_offered_is_refused(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    with pytest.raises(BadRequest, match="too large"):
        uploads.offer(ALICE, DIGEST, MAX_LORA_BYTES + 1)
    uploads.offer(ALICE, DIGEST, len(DATA))
    with pytest.raises(BadRequest, match="not those of its digest"):
        uploads.put(ALICE, DIGEST, 0, bytes(len(DATA)), ())
    uploads.offer(ALICE, DIGEST, len(DATA))
    with pytest.raises(BadRequest, match="More bytes"):
        uploads.put(ALICE, DIGEST, 0, DATA + b"x", ())
    assert not list(tmp_path.iterdir())


def test_a_key_sends_two_at_once_at_most_until_they_are_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = LoraUploads(tmp_path, 10**9)
    for digest in ("a" * 64, "b" * 64):
        uploads.offer(ALICE, digest, 10)
    with pytest.raises(QueueFull):
        uploads.offer(ALICE, "c" * 64, 10)
    uploads.offer(BOB, "c" * 64, 10)
    monkeypatch.setattr(lora_uploads, "IDLE_SECONDS", -1.0)
    assert uploads.offer(ALICE, "d" * 64, 10) == 0
    assert len(list(tmp_path.glob("*.part"))) == 1
    LoraUploads(tmp_path, 10**9)
    uploads.close()
    assert not list(tmp_path.glob("*.part"))  # of an orchestrator that is gone


def test_the_oldest_go_first_but_for_links_and_what_is_needed(tmp_path: Path) -> None:
    uploads = LoraUploads(tmp_path, 2 * len(DATA))
    files = [DATA[n:] + DATA[:n] for n in (1, 2, 3)]
    digests = [hashlib.sha256(data).hexdigest() for data in files]
    (tmp_path / f"{'f' * 64}.safetensors").symlink_to(tmp_path / "elsewhere")
    for age, data in enumerate(files):
        have = uploads.offer(LOCAL_USER, digests[age], len(data))
        assert uploads.put(LOCAL_USER, digests[age], have, data, {digests[0]}) == len(data)
        os.utime(tmp_path / f"{digests[age]}.safetensors", (1000 + age, 1000 + age))
    left = {path.stem for path in tmp_path.iterdir()}
    assert left == {digests[0], digests[2], "f" * 64}

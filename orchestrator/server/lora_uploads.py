"""LoRAs that clients send: written in parts, kept by the digest of all their bytes, the oldest let go of first.

Nothing is synced to the disk, which may take seconds: a worker that reads a file checks its digest.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.principal import LocalUser, Principal
from protocol.errors import BadRequest, NotFound, QueueFull
from protocol.lora import LORA_PART_BYTES, MAX_LORA_BYTES, LoraRequest
from protocol.tensors import Buffer
from protocol.units import format_bytes

MOST_OPEN, MOST_OF_A_KEY = 16, 2  # uploads at once
IDLE_SECONDS = 60.0
Needed = Callable[[], set[str]]  # digests of files that stay


@dataclass(slots=True)
class Upload:
    path: Path
    file: BinaryIO
    size: int  # bytes, in the end
    have: int = 0
    hash: Any = field(default_factory=hashlib.sha256)
    heard: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


class LoraUploads:
    """`shelf` is the folder where LoRAs lie by their digests.

    What clients have sent takes at most `limit` bytes, and leaves `floor` bytes of the disk free.
    """

    def __init__(self, shelf: Path, limit: int, floor: int = 0) -> None:
        self._shelf, self._limit, self._floor = shelf, limit, floor
        self._open: dict[tuple[Principal, str], Upload] = {}
        self._sent: set[tuple[Principal, str]] = set()  # of a key's holder nobody else learns what is here
        self._number = 0
        for left in shelf.glob("*.part"):
            left.unlink(missing_ok=True)

    def check(self, principal: Principal, asked: Sequence[LoraRequest]) -> None:
        """Raise NotFound where a key's holder names a file that it has not sent since the stack's start."""
        for lora in asked:
            if lora.digest and not isinstance(principal, LocalUser) and (principal, lora.digest) not in self._sent:
                raise NotFound(f"The file of LoRA {lora.name!r} is not here.", "Give it: --lora FILE.safetensors")

    def offer(self, principal: Principal, digest: str, size: int, needed: Needed) -> int:
        """Return how many bytes of a file are here already; all of them: it need not be sent. BadRequest, QueueFull."""
        if not 0 < size <= MAX_LORA_BYTES:
            limit = f"At most {format_bytes(MAX_LORA_BYTES)}."
            raise BadRequest(f"A LoRA of {format_bytes(size)} is too large.", limit)
        place, known = self._place(digest), isinstance(principal, LocalUser) or (principal, digest) in self._sent
        try:
            if known and place.is_file() and not place.is_symlink():
                place.touch()
                return size
            if (principal, digest) not in self._open:
                self._begin(principal, digest, size, needed)
        except OSError as error:
            raise unkept(error) from error
        return self._open[principal, digest].have

    def _begin(self, principal: Principal, digest: str, size: int, needed: Needed) -> None:
        self.end_idle()
        own = sum(other == principal for other, _ in self._open)
        if len(self._open) >= MOST_OPEN or (not isinstance(principal, LocalUser) and own >= MOST_OF_A_KEY):
            raise QueueFull("Too many LoRAs are being sent at once.", "Try again later.")
        self._shelf.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(size, needed())
        self._number += 1
        path = self._shelf / f"{digest}.{self._number}.part"
        self._open[principal, digest] = Upload(path, path.open("wb"), size)

    def _make_room(self, size: int, needed: set[str]) -> None:
        """Remove what clients sent and was used longest ago, beyond the limit; links to others' stay. QueueFull."""
        files = [path for path in self._shelf.glob("*.safetensors") if not path.is_symlink()]
        ages = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in files)
        coming = size + sum(upload.size for upload in self._open.values())
        over = sum(held for _, held, _ in ages) + coming - self._limit
        for _, held, path in ages:
            if over > 0 and path.stem not in needed:
                path.unlink(missing_ok=True)
                self._sent = {(who, digest) for who, digest in self._sent if digest != path.stem}
                over -= held
        if over > 0:
            limit = format_bytes(self._limit)
            raise QueueFull(
                f"The LoRAs of unfinished jobs take the {limit} that there are (--lora-cache).", "Try later."
            )
        if shutil.disk_usage(self._shelf).free - coming < self._floor:
            raise QueueFull("The stack's disk has no room for a LoRA.", "Make room there, or try later.")

    def put(self, principal: Principal, digest: str, offset: int, data: Buffer) -> int:
        """Take in a part, and return how many bytes are here. BadRequest."""
        upload = self._open.get((principal, digest))
        if upload is None or offset != upload.have:
            return upload.have if upload else 0
        part = memoryview(data).cast("B")
        upload.heard = time.monotonic()
        try:
            if upload.have + len(part) > upload.size:
                raise BadRequest("More bytes came than the LoRA's file has.", "Send it again.")
            upload.file.write(part)
            upload.hash.update(part)
            upload.have += len(part)
            if upload.have == upload.size:
                self._finish(principal, digest, upload)
        except (BadRequest, OSError) as error:
            if left := self._open.pop((principal, digest), None):
                left.close()
            if isinstance(error, OSError):
                raise unkept(error) from error
            raise
        return upload.have

    def _finish(self, principal: Principal, digest: str, upload: Upload) -> None:
        if upload.hash.hexdigest() != digest:
            raise BadRequest("The LoRA's bytes are not those of its digest.", "Send it again.")
        upload.file.close()
        upload.path.replace(self._place(digest))
        self._open.pop((principal, digest)).close()
        self._sent.add((principal, digest))

    def part(self, digest: str, offset: int) -> tuple[int, bytes]:
        """Return how many bytes a file has, 0 where it isn't here, and some of them from an offset on."""
        try:
            place = self._place(digest)
            with place.open("rb") as file:
                size = place.stat().st_size
                file.seek(offset)
                return size, file.read(LORA_PART_BYTES)
        except OSError:
            return 0, b""

    def close(self) -> None:
        """Let go of all that has come in part."""
        for upload in self._open.values():
            upload.close()
        self._open.clear()

    def end_idle(self) -> None:
        """Let go of what nobody has sent more of for a while."""
        for key, upload in list(self._open.items()):
            if time.monotonic() - upload.heard > IDLE_SECONDS:
                self._open.pop(key).close()

    def _place(self, digest: str) -> Path:
        return self._shelf / f"{digest}.safetensors"


def unkept(error: OSError) -> BadRequest:
    return BadRequest(f"The LoRA can't be kept: {error.strerror}.", "Make room on the stack's disk.")

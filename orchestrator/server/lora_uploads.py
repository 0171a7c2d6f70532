"""LoRAs that clients send: written in parts, kept by the digest of all their bytes, the oldest let go of first."""

import hashlib
import os
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.principal import LocalUser, Principal
from protocol.errors import BadRequest, QueueFull
from protocol.lora import MAX_LORA_BYTES
from protocol.tensors import Buffer
from protocol.units import format_bytes

MOST_OPEN, MOST_OF_A_KEY = 16, 2  # uploads at once
IDLE_SECONDS = 60.0


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
    """`shelf` is the folder where LoRAs lie by their digests; what clients have sent takes at most `limit` bytes."""

    def __init__(self, shelf: Path, limit: int) -> None:
        self._shelf, self._limit = shelf, limit
        self._open: dict[tuple[Principal, str], Upload] = {}
        self._sent: set[tuple[Principal, str]] = set()  # of a key's holder nobody else learns what is here
        for left in shelf.glob("*.part"):
            left.unlink(missing_ok=True)

    def offer(self, principal: Principal, digest: str, size: int) -> int:
        """Return how many bytes of a file are here already; all of them: it need not be sent. BadRequest, QueueFull."""
        if not 0 < size <= MAX_LORA_BYTES:
            raise BadRequest(
                f"A LoRA of {format_bytes(size)} is too large.", f"At most {format_bytes(MAX_LORA_BYTES)}."
            )
        place, known = self._place(digest), isinstance(principal, LocalUser) or (principal, digest) in self._sent
        if known and place.exists():
            os.utime(place)
            return size
        if (principal, digest) not in self._open:
            self._end_idle()
            own = sum(other == principal for other, _ in self._open)
            if len(self._open) >= MOST_OPEN or (not isinstance(principal, LocalUser) and own >= MOST_OF_A_KEY):
                raise QueueFull("Too many LoRAs are being sent at once.", "Try again later.")
            self._shelf.mkdir(parents=True, exist_ok=True, mode=0o700)
            path = self._shelf / f"{digest}.{len(self._sent)}-{time.monotonic_ns()}.part"
            self._open[principal, digest] = Upload(path, path.open("wb"), size)
        return self._open[principal, digest].have

    def put(self, principal: Principal, digest: str, offset: int, data: Buffer, needed: Container[str]) -> int:
        """Take in a part, and return how many bytes are here; files of `needed` digests stay. BadRequest."""
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
                self._finish(principal, digest, upload, needed)
        except (BadRequest, OSError) as error:
            if left := self._open.pop((principal, digest), None):
                left.close()
            if isinstance(error, OSError):
                raise BadRequest(
                    f"The LoRA can't be kept: {error.strerror}.", "Make room on the stack's disk."
                ) from error
            raise
        return upload.have

    def _finish(self, principal: Principal, digest: str, upload: Upload, needed: Container[str]) -> None:
        if upload.hash.hexdigest() != digest:
            raise BadRequest("The LoRA's bytes are not those of its digest.", "Send it again.")
        upload.file.flush()
        os.fsync(upload.file.fileno())
        upload.path.replace(self._place(digest))
        self._open.pop((principal, digest)).close()
        self._sent.add((principal, digest))
        self._shrink(needed, digest)

    def _shrink(self, needed: Container[str], newest: str) -> None:
        """Remove the files of clients that were used longest ago, beyond the limit; links to others' stay."""
        files = [path for path in self._shelf.glob("*.safetensors") if not path.is_symlink()]
        ages = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in files)
        over = sum(size for _, size, _ in ages) - self._limit
        for _, size, path in ages:
            if over > 0 and path.stem != newest and path.stem not in needed:
                path.unlink(missing_ok=True)
                over -= size

    def close(self) -> None:
        """Let go of all that has come in part."""
        for upload in self._open.values():
            upload.close()
        self._open.clear()

    def _end_idle(self) -> None:
        for key, upload in list(self._open.items()):
            if time.monotonic() - upload.heard > IDLE_SECONDS:
                self._open.pop(key).close()

    def _place(self, digest: str) -> Path:
        return self._shelf / f"{digest}.safetensors"

"""LoRAs that a client names: aliases of the stack's, or files of its own, which are sent by their content."""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BadRequest
from protocol.lora import LORA_NAME, MAX_LORA_BYTES, LoraRequest, check_weight, parse_lora
from protocol.units import format_bytes

LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library takes
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA's file of a client's."""

    path: Path
    digest: str  # sha256
    bytes: int


@dataclass(frozen=True, slots=True)
class GivenLoras:
    requests: tuple[LoraRequest, ...] = ()
    files: tuple[LoraFile, ...] = ()


def loras_of(texts: Iterable[str]) -> GivenLoras:
    """Read NAME[@WEIGHT], where NAME is an alias or a path; BadRequest."""
    requests: list[LoraRequest] = []
    files: list[LoraFile] = []
    for text in texts:
        whole = Path(text).is_file() or is_file(text.rpartition("@")[2])  # of a path, which may hold an @
        name, weight = (text, 1.0) if whole else parse_lora(text)
        check_weight(name, weight)
        if is_file(name):
            file = lora_file(Path(name).expanduser())
            files.append(file)
            requests.append(LoraRequest(name=name_of(file.path), weight=weight, digest=file.digest))
        elif LORA_NAME.fullmatch(name) is None:
            hint = "An alias has letters, digits, dots, spaces, - and _."
            raise BadRequest(f"{name!r} is neither a LoRA's alias nor a file.", hint)
        else:
            requests.append(LoraRequest(name=name, weight=weight))
    return GivenLoras(tuple(requests), tuple(files))


def is_file(name: str) -> bool:
    """Return whether a name is meant as a path: it has a slash or a file's suffix, or there is such a file."""
    suffix = name.lower().endswith((SUFFIX, ".ckpt", ".pt", ".pth", ".bin", ".gguf"))
    return suffix or os.sep in name or Path(name).is_file()


def name_of(path: Path) -> str:
    """Return the name by which a file's LoRA is told."""
    return re.sub(r"[^A-Za-z0-9_. -]", "_", path.stem).lstrip(". -")[:127] or "lora"


def lora_file(path: Path) -> LoraFile:
    """Look at a LoRA's file, and make its digest; BadRequest for what is no safetensors file, or too large."""
    try:
        size = path.stat().st_size
        if path.suffix.lower() != SUFFIX:
            raise BadRequest(
                f"{str(path)!r} is no safetensors file.", "Only those are taken: other formats may hold programs."
            )
        if size > MAX_LORA_BYTES:
            raise BadRequest(
                f"{str(path)!r} has {format_bytes(size)}; a LoRA has at most {format_bytes(MAX_LORA_BYTES)}.",
                "Is it a whole model? Those are for: triptych up --model",
            )
        with path.open("rb") as file:
            if not has_header(file.read(8), size, file.read):
                raise BadRequest(f"{str(path)!r} is no safetensors file, or is damaged.", "Download it again.")
            file.seek(0)
            return LoraFile(path, hashlib.file_digest(file, "sha256").hexdigest(), size)
    except OSError as error:
        raise BadRequest(f"The LoRA {str(path)!r} can't be read: {error.strerror}.") from error


def has_header(begin: bytes, size: int, read: Callable[[int], bytes]) -> bool:
    """Return whether a file begins as safetensors files do."""
    length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        return False
    try:
        return isinstance(json.loads(read(length)), dict)
    except (ValueError, RecursionError):
        return False


def all_text(given: object) -> bool:
    """Return whether LoRAs are given as texts, such as NAME@0.8."""
    return isinstance(given, list | tuple) and all(isinstance(one, str) for one in given)

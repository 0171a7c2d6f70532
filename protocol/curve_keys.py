"""CURVE keys, and the file in which a peer carries its own. Private to their user, or they are refused.

A key's file is all that its holder needs: where the stack listens, the stack's public key, and the holder's own pair.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import zmq

from protocol.errors import BadRequest

DoorRole = Literal["client", "worker"]  # where others come in
Role = Literal["client", "worker", "host"]  # of a key; a host's is the stack's own on another machine
DOORS: tuple[DoorRole, ...] = ("client", "worker")
ROLES: tuple[Role, ...] = ("client", "worker", "host")
DOOR_OF: dict[Role, DoorRole] = {"client": "client", "worker": "worker", "host": "worker"}
LISTENS: dict[Role, str] = {"client": "--listen", "worker": "--listen-workers", "host": "--listen-workers"}
Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
FORMAT = "triptych-key-1"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Z85 texts of 40 characters, as ZeroMQ writes Curve25519 keys."""

    public: str
    secret: str

    @staticmethod
    def new() -> "KeyPair":
        public, secret = zmq.curve_keypair()
        return KeyPair(public.decode(), secret.decode())


@dataclass(frozen=True, slots=True)
class PeerKey:
    """The content of a key file: all that a peer needs to reach a stack."""

    name: str
    role: Role
    endpoint: str
    server: str  # the stack's public key
    public: str
    secret: str


def checked_public(text: str) -> str:
    """A public key as it is; BadRequest."""
    if not Z85.fullmatch(text):
        raise BadRequest(f"{text[:60]!r} is not a public key.", "It has 40 characters; 'triptych keys new' prints one.")
    return text


def checked_name(text: str) -> str:
    """A key's name as it is; BadRequest."""
    if not NAME.fullmatch(text):
        raise BadRequest(
            f"{text[:80]!r} is no name for a key.", "Use letters, digits, '_', '-', '.' and '@', up to 64."
        )
    return text


def write_private(path: Path, text: str) -> None:
    """Write a file that only its user can read, whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))  # the kernel's own clock is too coarse to tell
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise BadRequest(f"{str(path)!r} can't be written: {error.strerror}.") from error


def read_private(path: Path) -> str:
    """A file that nobody else can read; BadRequest if others can."""
    try:
        if path.stat().st_mode & 0o077:
            raise BadRequest(f"Others can read {str(path)!r}, which holds a secret key.", f"chmod 600 {path}")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"The key file {str(path)!r} can't be read: {error}.") from error


def save(path: Path, key: PeerKey) -> None:
    if path.exists():
        raise BadRequest(f"{str(path)!r} exists already.", "Choose another file with -o, or remove it.")
    write_key(path, key)


def write_key(path: Path, key: PeerKey) -> None:
    """Write a key's file, in the place of one that is there."""
    write_private(path, json.dumps({"format": FORMAT, **asdict(key)}, indent=1) + "\n")


def load(path: Path) -> PeerKey:
    """The key in a file; BadRequest."""
    try:
        match json.loads(read_private(path)):
            case {
                "format": str(version), "name": str(name), "role": "client" | "worker" | "host" as role,
                "endpoint": str(endpoint), "server": str(server), "public": str(public), "secret": str(secret), **rest,
            } if version == FORMAT and not rest and all(map(Z85.fullmatch, (server, public, secret))):  # fmt: skip
                return PeerKey(name, role, endpoint, server, public, secret)
    except ValueError:
        pass
    raise BadRequest(f"{str(path)!r} is not a key file.", "'triptych keys new NAME' makes one, on the stack's host.")

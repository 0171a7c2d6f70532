"""The keys that are let in from outside: names, roles and what proves them, in a file that `triptych keys` changes.

A key is a CURVE pair, of which the public part is here, or a token for HTTP, of which a digest is: a client may have
both.

The orchestrator looks at it again whenever it has changed, so that a key that is revoked counts for nothing at once,
also on connections that it made before.
"""

import fcntl
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.principal import Host, KeyHolder, Principal
from protocol.curve_keys import (
    DOOR_OF,
    ROLES,
    DoorRole,
    KeyPair,
    PeerKey,
    Role,
    checked_name,
    checked_public,
    read_private,
    write_private,
)
from protocol.errors import BadRequest, Conflict, NotFound, StateUnusable

log = logging.getLogger(__name__)

LEAST_WEIGHT = 0.01


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    role: Role
    public: str  # empty for one that comes by HTTP alone
    added: float  # seconds since the epoch
    weight: float = 1.0  # of a client: how much of the workers' time it has beside others
    token: str = ""  # sha256 of its token for HTTP; empty: it has none

    @property
    def principal(self) -> Principal:
        return Host(self.name) if self.role == "host" else KeyHolder(self.name)

    def check(self) -> None:
        """Raise BadRequest or ValueError for what can't be an entry."""
        checked_name(self.name)
        checked_weight(self.weight)
        if self.role not in ROLES or not (self.public or self.token) or (self.role == "host" and "@" in self.name):
            raise ValueError(self.role)
        if self.public:
            checked_public(self.public)


class KeyFolder:
    """The stack's own key pair, and the keys that are let in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server, self._allowed = folder / "server.json", folder / "allowed.json"

    @property
    def exists(self) -> bool:
        """Return whether this stack has a key of its own, without which nobody comes in from outside."""
        return self._server.exists()

    def server(self) -> KeyPair:
        """The stack's key pair, made when it is first asked for."""
        with self._locked():
            if not self._server.exists():
                write_private(self._server, json.dumps(asdict(KeyPair.new())))
            try:
                return KeyPair(**json.loads(read_private(self._server)))
            except (ValueError, TypeError) as error:
                raise StateUnusable(
                    f"{str(self._server)!r} holds no key pair.", "Remove it to have a new one made."
                ) from error

    def entries(self) -> list[Entry]:
        if not self._allowed.exists():
            return []
        try:
            found = [Entry(**row) for row in json.loads(read_private(self._allowed))]
            for entry in found:
                entry.check()
        except (ValueError, TypeError, AttributeError, BadRequest) as error:
            raise StateUnusable(f"The list of keys {str(self._allowed)!r} can't be read: {error}.") from error
        return found

    def add(self, name: str, role: Role, public: str, weight: float = 1.0) -> None:
        """Let a key in; BadRequest, or Conflict if the name or the key is there already."""
        checked_name(name)
        if role == "host" and "@" in name:
            raise BadRequest(
                f"{name!r} is no name for a host.", "Use one without '@', which stands before it in workers' names."
            )
        checked_weight(weight)
        with self._changing() as entries:
            for entry in entries:
                if name == entry.name or public == entry.public:
                    raise Conflict(f"There is a key {entry.name!r} already.", f"triptych keys revoke {entry.name}")
            entries.append(Entry(name, role, checked_public(public), time.time(), weight))

    def issue(self, name: str, role: Role, endpoint: str, weight: float = 1.0) -> PeerKey:
        """Make a key, let it in as `add` does, and return what its holder needs to find the stack at an endpoint."""
        pair = KeyPair.new()
        key = PeerKey(name, role, endpoint, self.server().public, pair.public, pair.secret)
        self.add(name, role, pair.public, weight)
        return key

    def issue_token(self, name: str, weight: float = 1.0) -> str:
        """Make a token with which NAME comes in by HTTP, and return it: it is kept nowhere. BadRequest, Conflict.

        A client that has a key already comes in with either, as the same owner of jobs.
        """
        checked_name(name)
        checked_weight(weight)
        token = f"tk-{secrets.token_urlsafe(32)}"
        digest = digest_of_token(token)
        with self._changing() as entries:
            known = {entry.name: number for number, entry in enumerate(entries)}
            if name not in known:
                entries.append(Entry(name, "client", "", time.time(), weight, digest))
                return token
            entry = entries[known[name]]
            if entry.role != "client" or entry.token:
                raise Conflict(f"There is a key {name!r} already.", f"triptych keys revoke {name}")
            entries[known[name]] = replace(entry, token=digest)
        return token

    def revoke(self, name: str) -> None:
        """Let a key in no longer; NotFound."""
        with self._changing() as entries:
            kept = [entry for entry in entries if entry.name != name]
            if len(kept) == len(entries):
                raise NotFound(f"There is no key {name!r}.", "'triptych keys list' shows those that there are.")
            entries[:] = kept

    @contextmanager
    def _changing(self) -> Iterator[list[Entry]]:
        with self._locked():
            entries = self.entries()
            yield entries
            write_private(self._allowed, json.dumps([asdict(entry) for entry in entries], indent=1))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise StateUnusable(f"{str(self._folder)!r} can't be written: {error.strerror}.") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def stamp(self) -> tuple[int, int]:
        """Return a stamp that changes when the list does."""
        try:
            status = self._allowed.stat()
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino


def digest_of_token(token: str) -> str:
    """Return what is kept of a token: it has 256 bits of chance, so that a plain hash tells nothing of it."""
    return hashlib.sha256(token.encode()).hexdigest()


def checked_weight(weight: float) -> float:
    """Return a client's weight; BadRequest where it can't be one."""
    if not LEAST_WEIGHT <= weight <= 1 / LEAST_WEIGHT:
        raise BadRequest(f"{weight:g} is no weight.", f"Give a number from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}.")
    return weight


class AllowedKeys:
    """The list as the orchestrator knows it."""

    def __init__(self, folder: KeyFolder) -> None:
        self._folder = folder
        self._stamp: Any = None
        self._by_public: dict[str, Entry] = {}
        self._by_token: dict[str, str] = {}  # names, by the digests of their tokens
        self._weights: dict[str, float] = {}  # by the names of keys
        self.look_again()

    def look_again(self) -> bool:
        """Read the list again if it has changed; return whether it had. A list that can't be read lets nobody in."""
        if (stamp := self._folder.stamp()) == self._stamp:
            return False
        self._stamp = stamp
        try:
            entries = self._folder.entries()
        except StateUnusable as error:
            log.error("nobody from outside is let in: %s", error)
            entries = []
        self._by_public = {entry.public: entry for entry in entries if entry.public}
        self._by_token = {entry.token: entry.name for entry in entries if entry.token}
        self._weights = {entry.name: entry.weight for entry in entries}
        return True

    def weight(self, owner: Principal) -> float:
        """Return an owner's weight: 1 for this machine's user, and for keys that are gone."""
        return self._weights.get(owner.name, 1.0) if isinstance(owner, KeyHolder) else 1.0

    def entry(self, public: str, door: DoorRole) -> Entry | None:
        """Return the entry of a key, if it is let in at a door."""
        found = self._by_public.get(public)
        return found if found and DOOR_OF[found.role] == door else None

    def is_host(self, name: str) -> bool:
        """Return whether a name is let in as a host, as of the last look."""
        return any(entry.name == name and entry.role == "host" for entry in self._by_public.values())

    def knows(self, name: str) -> bool:
        """Return whether a name is let in, as of now."""
        self.look_again()
        return name in self._weights

    def holder_of(self, token: str) -> str | None:
        """Return the name of whoever a token for HTTP is; None where it is not let in."""
        return self._by_token.get(digest_of_token(token))

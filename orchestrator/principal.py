"""Principals, on whose behalf something is asked: this machine's own user, or the holder of a key."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalUser:
    """The user who may open the stack's private sockets: its administrator."""


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """The holder of a client's or a worker's key; the owner of the jobs that were submitted with it."""

    name: str


Principal = LocalUser | KeyHolder
LOCAL_USER = LocalUser()


def to_column(principal: Principal) -> str:
    """Return a principal as the job database keeps it: the key's name, empty for the local user."""
    return principal.name if isinstance(principal, KeyHolder) else ""


def from_column(name: str) -> Principal:
    return KeyHolder(name) if name else LOCAL_USER

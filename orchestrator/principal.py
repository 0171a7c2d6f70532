"""Principals, on whose behalf something is asked or done: this machine's user, a key's holder, another host."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalUser:
    """The user who may open the stack's private sockets: its administrator."""


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """The holder of a client's or a worker's key; the owner of the jobs that were submitted with it."""

    name: str


@dataclass(frozen=True, slots=True)
class Host:
    """Another machine of the stack's, by the name of its key: its processes are the stack's own, and it has no jobs."""

    name: str


Principal = LocalUser | KeyHolder | Host
LOCAL_USER = LocalUser()


def kept_name(owner: Principal, name: str) -> str:
    """Return the name under which something is kept for an owner: by naming it, nobody learns that another has it."""
    return f"{name}@{owner.name}" if isinstance(owner, KeyHolder) else name


def job_id_of(owner: Principal, given: str) -> str:
    """Return a job's id in this stack, from the one that its owner has given: others may give the same."""
    if isinstance(owner, LocalUser):
        return given
    return f"k{hashlib.sha256(f'{owner.name}/{given}'.encode()).hexdigest()[:24]}"


def to_column(principal: Principal) -> str:
    """Return a principal as the job database keeps it: the key's name, empty for the local user."""
    return principal.name if isinstance(principal, KeyHolder) else ""


def name_of(principal: Principal) -> str:
    """Return a principal's name for a log."""
    return "this machine's user" if isinstance(principal, LocalUser) else principal.name


def from_column(name: str) -> Principal:
    return KeyHolder(name) if name else LOCAL_USER

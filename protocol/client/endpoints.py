"""The endpoints of a stack: its folder names the sockets while it runs, a key's file those of a remote one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from protocol.curve_keys import PeerKey, load
from protocol.errors import BadRequest, NoStack

PUBLISHED = "stack.json"
LORAS = "loras"  # name of the folder where LoRAs lie by their digests
CPU_LOCK = "cpu.lock"  # in a stack's folder, held by the worker that computes on the CPU


@dataclass(frozen=True, slots=True)
class Endpoints:
    clients: str
    workers: str


def default_folder() -> Path:
    """Return a stack's folder: TRIPTYCH_STATE, or else `triptych` in the user's state folder."""
    named = os.environ.get("TRIPTYCH_STATE")
    return Path(named) if named else Path(platformdirs.user_state_dir("triptych", appauthor=False))


def published(folder: Path) -> Endpoints:
    """The endpoints of the stack that runs in a folder; NoStack if none does."""
    try:
        found = json.loads((folder / PUBLISHED).read_text())
        return Endpoints(str(found["clients"]), str(found["workers"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise no_stack(f"in {str(folder)!r}") from error


def reach(state: Path | None) -> tuple[str, PeerKey | None]:
    """Return a stack's endpoint for clients, and the key for it, from its folder or a key file; NoStack, BadRequest."""
    where = state or default_folder()
    if not where.is_file():
        return published(where).clients, None
    key = load(where)
    if key.role != "client":
        raise BadRequest(
            f"{str(where)!r} is a {key.role}'s key.",
            f"Use it as: triptych {f'join {where}' if key.role == 'host' else f'worker STAGE --state {where}'}",
        )
    return key.endpoint, key


def no_answer(endpoint: str, key: PeerKey | None) -> NoStack:
    """Return the error for a failed connection. A server says nothing to keys that it doesn't let in."""
    if key is None:
        return no_stack(f"at {endpoint}")
    return NoStack(
        f"Nothing at {endpoint} lets the key {key.name!r} in.",
        "Ask whoever runs the stack whether it is up, with --listen, and the key on its list: triptych keys list.",
    )


def no_stack(where: str) -> NoStack:
    return NoStack(
        f"No stack is running {where}.",
        "Start one with 'triptych up', or make a picture without one: triptych run \"a large red circle\".",
    )

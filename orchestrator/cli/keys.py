"""`keys`: the clients and workers that may reach a stack from another machine."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import click

from orchestrator.access import KeyFolder, checked_weight
from orchestrator.cli.jobs import age
from orchestrator.cli.options import json_option, state_folder, state_option
from orchestrator.cli.table import print_table
from orchestrator.state_folder import StackFolder
from protocol.client.endpoints import PUBLISHED
from protocol.curve_keys import DOOR_OF, LISTENS, ROLES, KeyPair, PeerKey, Role, checked_name, checked_public, save
from protocol.errors import BadRequest

role_option = click.option("--role", type=click.Choice(ROLES), default="client", show_default=True)
weight_option = click.option(
    "--weight", type=float, default=1.0, show_default=True, help="A client's part of the workers' time beside others'."
)


@click.group()
def keys() -> None:
    """Let clients and workers on other machines in, and out again.

    \b
    On the stack's host:
      triptych keys new alice --endpoint tcp://my-host:5555      (writes alice.key)
      triptych up --listen tcp://0.0.0.0:5555
    Where alice sits, with that file:
      triptych submit "a large red circle" --state alice.key
    For the GPUs of another machine:
      triptych keys new box --role host                          (there: triptych join box.key)
    For browsers and other programs, by HTTP:
      triptych keys new alice --http                             (prints it)
    """


def key_folder(state: Path | None) -> KeyFolder:
    folder = StackFolder(state_folder(state))
    folder.create()
    return KeyFolder(folder.keys)


@keys.command()
@click.argument("name")
@role_option
@click.option(
    "--endpoint", metavar="tcp://HOST:PORT", help="Where its holder finds the stack. [default: of the running stack]"
)
@click.option(
    "--server", metavar="KEY", help="The stack's public key: make a pair here that is let in there with 'add'."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The key's file. [default: NAME.key]")
@click.option("--http", is_flag=True, help="Make a token for HTTP, and print it: it is kept nowhere.")
@weight_option
@state_option
def new(
    name: str,
    role: Role,
    endpoint: str | None,
    server: str | None,
    output: Path | None,
    http: bool,
    weight: float,
    state: Path | None,
) -> None:
    """Make a key NAME, let it in, and write the file that its holder needs. Carry it as you would a password."""
    checked_name(name)
    checked_weight(weight)
    if http:
        if role != "client" or endpoint or server or output:
            raise BadRequest("--http makes a client's token, which needs no file.", "Leave out the other options.")
        print(key_folder(state).issue_token(name, weight))
        print(f"{name} comes in by HTTP with that as a bearer's key, or as a password of any user's.", file=sys.stderr)
        return
    output = output or Path(f"{name}.key")
    if output.exists():
        raise BadRequest(f"{str(output)!r} exists already.", "Choose another file with -o, or remove it.")
    if server is not None:
        if endpoint is None:
            raise BadRequest("With --server there is no stack here to ask.", "Give its --endpoint tcp://HOST:PORT.")
        pair = KeyPair.new()
        save(output, PeerKey(name, role, endpoint, checked_public(server), pair.public, pair.secret))
        print(pair.public)
        more = f" --weight {weight:g}" if weight != 1 else ""
        print(f"On the stack's host: triptych keys add {name} '{pair.public}' --role {role}{more}", file=sys.stderr)
        return
    folder = key_folder(state)
    first = not folder.exists
    endpoint = endpoint or running_endpoint(state_folder(state), role)
    save(output, folder.issue(name, role, endpoint, weight))
    use = {
        "client": f"triptych submit … --state {output}",
        "worker": f"triptych worker STAGE --state {output}",
        "host": f"triptych join {output}",
    }[role]
    print(f"{output} lets a {role} in at {endpoint}. Carry it there safely; use it as: {use}", file=sys.stderr)
    if first:
        print(f"Start the stack with {LISTENS[role]} tcp://0.0.0.0:PORT (again, if it runs already).", file=sys.stderr)


def running_endpoint(folder: Path, role: Role) -> str:
    """Return the endpoint where the running stack listens for a role, as others may find it."""
    try:
        endpoint = str(json.loads((folder / PUBLISHED).read_text())["remote"][DOOR_OF[role]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(
            "No stack runs here that listens for others.",
            f"Give --endpoint tcp://HOST:PORT, as they will find it, and start the stack with {LISTENS[role]}.",
        ) from error
    return endpoint.replace("//0.0.0.0:", f"//{socket.getfqdn()}:")


@keys.command()
@click.argument("name")
@click.argument("public")
@role_option
@weight_option
@state_option
def add(name: str, public: str, role: Role, weight: float, state: Path | None) -> None:
    """Let a key NAME in that was made elsewhere, by its PUBLIC part."""
    folder = key_folder(state)
    folder.add(name, role, public, weight)
    print(f"{name} may come in as a {role}; the stack's public key is {folder.server().public}", file=sys.stderr)


@keys.command("list")
@json_option
@state_option
def list_keys(as_json: bool, state: Path | None) -> None:
    """Show whose keys are let in."""
    folder = key_folder(state)
    entries = folder.entries()
    if as_json:
        rows: list[dict[str, Any]] = [
            {
                "name": e.name,
                "role": e.role,
                "public": e.public,
                "added": e.added,
                "weight": e.weight,
                "http": bool(e.token),
            }
            for e in entries
        ]
        print(json.dumps(rows))
        return
    print_table(
        ("name", "role", "weight", "added", "by HTTP", "public key"),
        [[e.name, e.role, f"{e.weight:g}", age(e.added), "yes" if e.token else "", e.public] for e in entries],
        wide=0,
    )
    if folder.exists:
        print(f"The stack's public key is {folder.server().public}", file=sys.stderr)


@keys.command()
@click.argument("name")
@state_option
def revoke(name: str, state: Path | None) -> None:
    """Let the key NAME in no longer, also where it is connected now."""
    key_folder(state).revoke(name)
    print(f"{name} is not let in any more.", file=sys.stderr)

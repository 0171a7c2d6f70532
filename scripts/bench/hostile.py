"""Measure what everybody else notices of one hostile peer: answers' times, memory, restarts, lines of logs.

    python -m scripts.bench.hostile --seconds 15 ask unread watch parts strangers connections flood vanish

Each beside a stack of its own on the demo model, on this machine's processors. Prints one JSON line a deed.
"""

import json
import tempfile
import time
from pathlib import Path

import click

from protocol.client.client import Client
from protocol.curve_keys import DoorRole
from protocol.job import JobRequest
from scripts.faults.hostile import DEEDS
from scripts.faults.hostile_peers import HostilePeers
from scripts.faults.saboteur import Stack

ENDED_JOBS = 500
ALL = ("none", *DEEDS, "vanish")


@click.command(help=__doc__.split("\n")[0])
@click.argument("deeds", type=click.Choice(ALL), nargs=-1)
@click.option("--seconds", type=float, default=15.0, show_default=True)
def main(deeds: tuple[str, ...], seconds: float) -> None:
    for deed in deeds or ALL:
        with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
            print(json.dumps({"deed": deed} | beside(Path(folder), deed, seconds)), flush=True)


def beside(folder: Path, deed: str, seconds: float) -> dict[str, object]:
    role: DoorRole = "worker" if deed == "vanish" else "client"
    peers = HostilePeers(folder, () if deed == "none" else (("mallory", deed, role),))
    stack = Stack(folder, ["--device", "cpu", *peers.let_in()])
    try:
        stack.wait_ready()
        with Client(stack.state, timeout=60) as client:
            old = client.submit_many([JobRequest(prompt=f"old {number}") for number in range(ENDED_JOBS)])
            client.cancel(*(job.id for job in old))
            if (model := client.stack().model) is None:
                raise SystemExit("the stack knows no model")
            peers.start(model)
            time.sleep(seconds)
            peers.stop()
            restarts = {p.name: p.restarts for p in client.workers().processes if p.restarts}
        lines = {p.stem: len(p.read_text().splitlines()) for p in (stack.state / "logs").glob("*.log")}
        return peers.report() | {"restarts": restarts, "lines of logs": lines}
    finally:
        stack.stop()


if __name__ == "__main__":
    main()

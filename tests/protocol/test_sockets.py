"""Sockets: whatever a peer does, the process at the other end goes on, and a dead link is noticed."""

import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.sockets import configure
from tests.networks import hosts_or_skip

FLOODED = """
import sys, time, zmq
from protocol.sockets import dealer, new_identity, router
context, other = zmq.Context(), zmq.Context()
busy, quiet = router(context, sys.argv[1]), router(context, sys.argv[2])
flood = dealer(other, busy.getsockopt_string(zmq.LAST_ENDPOINT), new_identity())
friend = dealer(context, quiet.getsockopt_string(zmq.LAST_ENDPOINT), new_identity())
assert flood.poll(5000, zmq.POLLOUT)
sent = 0
while flood.poll(200, zmq.POLLOUT):  # until both queues and what lies between them are full
    flood.send(b"x" * 1000)
    sent += 1
flood.close(linger=0)
other.term()
end = time.monotonic() + 1.5  # heartbeats of ZeroMQ would have come meanwhile
while time.monotonic() < end:
    friend.send(b"still there?")
    quiet.recv_multipart()
read = 0
while busy.poll(200):
    busy.recv_multipart()
    read += 1
print("all read that came" if 0 < read <= sent else f"{read} of {sent}")
"""

ANSWERING = """
import sys, zmq
from protocol.sockets import configure
socket = zmq.Context().socket(zmq.DEALER)
configure(socket)
socket.connect(sys.argv[1])
socket.send(b"here")
socket.recv()
"""


@pytest.mark.parametrize("address", ["ipc://{}", "tcp://127.0.0.1:0"])
def test_a_peer_that_sends_more_than_is_read_and_goes_ends_nobody(tmp_path: Path, address: str) -> None:
    endpoints = [address.format(tmp_path / name) for name in ("busy", "quiet")]
    done = subprocess.run(
        [sys.executable, "-c", FLOODED, *endpoints], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "all read that came"), done.stderr


def test_a_link_that_nothing_passes_any_more_is_noticed() -> None:
    with hosts_or_skip(1) as network, zmq.Context() as context:
        (box,) = network.hosts
        with context.socket(zmq.ROUTER) as socket:
            configure(socket)
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            port = socket.bind_to_random_port(f"tcp://{network.near}")
            box.serve([sys.executable, "-c", ANSWERING, f"tcp://{network.near}:{port}"])
            assert socket.poll(30_000)
            assert socket.recv_multipart()[1] == b"here"
            box.cut()
            assert monitor.poll(30_000)  # a link that is merely quiet lasts for hours
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
            socket.disable_monitor()
            monitor.close()

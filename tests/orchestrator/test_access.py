"""Who comes in from outside, as whom, and what they may do there: real sockets, TCP and CURVE."""

import contextlib
import json
import stat
from pathlib import Path

import pytest
import zmq

from orchestrator.access import AllowedKeys, KeyFolder
from protocol.client.client import Client
from protocol.client.exchange import Exchange
from protocol.curve_keys import KeyPair, PeerKey, load, save
from protocol.errors import BadRequest, Conflict, Forbidden, NoStack, NotFound, QueueFull, StateUnusable
from protocol.job import JobRequest
from protocol.messages.client import GetStack
from protocol.messages.common import Error, Heartbeat
from protocol.messages.supervisor import Processes, SupervisorHello
from protocol.messages.worker import Committed
from protocol.sockets import check_endpoint, dealer, new_identity, send
from tests.fakes import Orchestrator, orchestrator
from tests.faults.hostile.peers import OPEN
from tests.faults.hostile.peers import key_of as let_in


def client_of(running: Orchestrator, key: PeerKey, timeout: float = 20) -> Client:
    path = running.folder / f"{len(running._opened)}.key"
    save(path, key)
    running._opened.append(client := Client(path, timeout=timeout))
    return client


def stack_without_a_key(endpoint: str) -> None:
    with Client(endpoint=endpoint) as client:
        client.stack()


def guarded(state: Path) -> None:
    KeyFolder(state / "keys").server()


def test_a_client_with_a_key_sees_its_own_jobs_and_nothing_else(state: Path) -> None:
    guarded(state)
    with orchestrator(state, **OPEN) as running:
        running.worker("text").ready()
        alice, bob = (client_of(running, let_in(running, name)) for name in ("alice", "bob"))
        mine = running.client()
        job, local = alice.submit("a cat", id="hers"), mine.submit("a dog")
        assert [j.id for j in alice.jobs()] == ["hers"]
        assert bob.jobs() == []
        assert {j.number for j in mine.jobs()} == {job.number, local.number}
        for ask in (bob.job, bob.cancel, bob.retry, bob.pictures, lambda i: bob.wait(i, 1)):
            with pytest.raises(NotFound, match="no job 'hers'"):
                ask(job.id)
        with pytest.raises(NotFound):
            alice.job(local.id)
        other = bob.submit("a cow", id="hers")  # nothing tells him that there is another
        assert (bob.job("hers").recipe.prompt, bob.cancel("hers")[0].state) == ("a cow", "cancelled")
        assert other.number != job.number
        assert alice.submit("a cat", id="hers").id == job.id
        assert [w.job for w in bob.workers().workers] == [None]
        assert [w.job for w in alice.workers().workers] == ["hers"]
        for forbidden in (bob.restart, bob.drain, lambda stage: bob.scale(stage, 2), lambda _: bob.collect_garbage(0)):
            with pytest.raises(Forbidden, match="own host"):
                forbidden("text")
        assert alice.cancel("hers")[0].state == "cancelled"


def test_only_those_on_the_list_come_in_and_only_in_their_role(state: Path) -> None:
    guarded(state)
    with orchestrator(state, **OPEN) as running:
        running.worker("text")
        alice, worker = let_in(running, "alice"), let_in(running, "box", "worker")
        pair = KeyPair.new()
        strangers = [
            PeerKey("eve", "client", alice.endpoint, alice.server, pair.public, pair.secret),  # the server's key alone
            PeerKey("box", "client", alice.endpoint, alice.server, worker.public, worker.secret),  # another role
            PeerKey("alice", "client", alice.endpoint, pair.public, alice.public, alice.secret),  # another server
        ]
        for key in strangers:
            with pytest.raises(NoStack, match=f"lets the key {key.name!r} in"):
                client_of(running, key).stack()
        with pytest.raises(NoStack):
            stack_without_a_key(alice.endpoint)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        knock = dealer(context, running.remote["worker"], new_identity(), alice)
        assert not knock.poll(500, zmq.POLLOUT)  # a client's key at the workers' door
        knock.close(linger=0)
        context.term()
        assert client_of(running, alice).stack().queue_limit == 50


def test_a_client_takes_over_its_own_identity_and_nobody_elses(state: Path) -> None:
    """A connection that is dead and not yet given up has the identity of a client that comes again."""
    guarded(state)
    with orchestrator(state, **OPEN) as running, zmq.Context() as context, contextlib.ExitStack() as sockets:
        running.worker("text")
        alice, bob = let_in(running, "alice"), let_in(running, "bob")
        identity, question = new_identity(), Exchange().ask(GetStack)[1]

        def is_answered(socket: zmq.Socket[bytes], milliseconds: int) -> bool:
            sockets.enter_context(socket)
            assert socket.poll(10_000, zmq.POLLOUT)
            send(socket, question)
            return bool(socket.poll(milliseconds, zmq.POLLIN))

        assert is_answered(dealer(context, alice.endpoint, identity, alice), 10_000)
        assert is_answered(dealer(context, alice.endpoint, identity, alice), 10_000)  # the first is there yet
        assert not is_answered(dealer(context, bob.endpoint, identity, bob), 500)
        nameless = context.socket(zmq.DEALER)  # libzmq gives it an identity that others can reckon
        nameless.curve_serverkey, nameless.curve_publickey = bob.server.encode(), bob.public.encode()
        nameless.curve_secretkey = bob.secret.encode()
        nameless.connect(bob.endpoint)
        assert not is_answered(nameless, 500)
        assert client_of(running, bob).stack()


def test_a_worker_with_a_key_works_and_may_not_pose_as_the_supervisor(state: Path) -> None:
    guarded(state)
    with orchestrator(state, **OPEN) as running:
        running.worker("vae")  # whose word it is which model this is
        worker = running.worker("text", key=let_in(running, "box", "worker")).ready()
        client = running.client()
        client.submit("a cat")
        worker.finish(worker.take())
        worker.hear(Committed)
        for message in (SupervisorHello(pid=1), Processes(processes=(), exited_pids=(1,))):
            worker.say(message)
            assert worker.hear(Error).code == "protocol"


def test_a_revoked_key_counts_for_nothing_on_a_connection_that_it_has(state: Path) -> None:
    guarded(state)
    with orchestrator(state, **OPEN) as running:
        keys = KeyFolder(state / "keys")
        running.worker("vae")
        worker = running.worker("text", key=let_in(running, "box", "worker")).ready()
        alice = client_of(running, key := let_in(running, "alice"), timeout=1)
        alice.submit("a cat")
        task = worker.take()
        keys.revoke("alice")
        keys.revoke("box")
        mine = running.client()
        while any(found.stage == "text" for found in mine.workers().workers):  # until the list has been looked at again
            pass
        with pytest.raises(NoStack, match="no answer"):
            alice.jobs()
        worker.finish(task)
        worker.say(Heartbeat(rss_bytes=1, gpu_bytes=0))
        other = running.worker("text").ready()
        assert other.take().attempt > task.attempt
        assert not [m for m in worker.seen if isinstance(m.message, Committed)]
        keys.add("alice", "client", KeyPair.new().public)  # the same name, another key
        with pytest.raises(NoStack, match="no answer"):
            alice.jobs()
        keys.revoke("alice")
        keys.add("alice", "client", key.public)
        assert client_of(running, key).jobs()[0].recipe.prompt == "a cat"


def test_one_client_cannot_fill_the_queue_of_all(state: Path) -> None:
    guarded(state)
    with orchestrator(state, client_jobs=3, client_rate=0.05, **OPEN) as running:
        running.worker("text")
        alice, bob = (client_of(running, let_in(running, name)) for name in ("alice", "bob"))
        alice.submit_many([JobRequest(prompt="x")] * 3)
        with pytest.raises(QueueFull, match="has 3 of at most 3"):
            alice.submit("x")
        bob.submit("x")
        alice.cancel(*(job.id for job in alice.jobs()))
        with pytest.raises(QueueFull, match="come too soon"):
            alice.submit("x")
        running.client().submit_many([JobRequest(prompt="x")] * 20)


def test_beyond_this_machine_nobody_listens_without_keys(state: Path) -> None:
    for endpoint in ("tcp://0.0.0.0:5555", "tcp://192.0.2.1:5555", "tcp://example.org:5555"):
        with pytest.raises(BadRequest, match="keys new"):
            check_endpoint(endpoint)
        check_endpoint(endpoint, secured=True)
    for endpoint in ("tcp://", "tcp://host", "udp://127.0.0.1:1", "ipc://", "/tmp/x", "tcp://[::1"):
        with pytest.raises(BadRequest, match="not an endpoint"):
            check_endpoint(endpoint, secured=True)


def test_key_files_are_private_and_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    pair = KeyPair.new()
    key = PeerKey("alice", "client", "tcp://127.0.0.1:1", pair.public, pair.public, pair.secret)
    path = tmp_path / "alice.key"
    save(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load(path) == key
    with pytest.raises(BadRequest, match="exists already"):
        save(path, key)
    path.chmod(0o640)
    with pytest.raises(BadRequest, match="chmod 600"):
        load(path)
    path.chmod(0o600)
    for text in ("", "{}", "[1]", json.dumps({**json.loads(path.read_text()), "secret": "short"}), "\x00"):
        path.write_text(text)
        with pytest.raises(BadRequest, match="not a key file"):
            load(path)
    with pytest.raises(BadRequest, match="can't be read"):
        load(tmp_path / "nothing")


def test_the_list_of_keys(tmp_path: Path) -> None:
    folder, public = KeyFolder(tmp_path / "keys"), KeyPair.new().public
    assert (folder.exists, folder.entries()) == (False, [])
    assert folder.server() == KeyFolder(tmp_path / "keys").server()
    folder.add("alice", "client", public)
    gate = AllowedKeys(folder)
    assert gate.entry(public, "client") is not None
    assert gate.entry(public, "worker") is None
    for name, other in (("alice", KeyPair.new().public), ("bob", public)):
        with pytest.raises(Conflict):
            folder.add(name, "client", other)
    for name in ("../x", "", "a" * 65, "a\nb"):
        with pytest.raises(BadRequest, match="no name"):
            folder.add(name, "client", KeyPair.new().public)
    with pytest.raises(BadRequest, match="not a public key"):
        folder.add("bob", "client", "short")
    folder.revoke("alice")
    assert gate.look_again()
    assert gate.entry(public, "client") is None
    with pytest.raises(NotFound):
        folder.revoke("alice")
    (tmp_path / "keys" / "allowed.json").write_text('[{"name": 1}]')
    with pytest.raises(StateUnusable):
        folder.entries()
    for file in (tmp_path / "keys").iterdir():
        assert file.name == "lock" or stat.S_IMODE(file.stat().st_mode) == 0o600

"""The order of turns: each principal's messages wait by themselves, within what they may cost."""

import time

import pytest

from orchestrator.principal import LOCAL_USER, KeyHolder, Principal
from orchestrator.server import inbox as inbox_module
from orchestrator.server.inbox import MOST_UNANSWERED, MOST_WAITING, WAITING_BYTES, Inbox, Received
from protocol.curve_keys import Role

ALICE, BOB, BOX = KeyHolder("alice"), KeyHolder("bob"), KeyHolder("box")


def message(who: Principal, peer: bytes = b"1", role: Role = "client", size: int = 1) -> Received:
    return Received(peer, role, who, [bytes(size)])


def always(who: Principal, peer: bytes) -> bool:
    return True


def served(inbox: Inbox, seconds: float = 10.0) -> list[Received]:
    found: list[Received] = []
    inbox.serve(found.append, seconds)
    return found


def test_principals_take_turns_and_so_do_their_connections() -> None:
    inbox = Inbox(always)
    for peer in (b"1", b"2"):
        for _ in range(3):
            inbox.put(message(ALICE, peer))
    inbox.put(message(BOB))
    inbox.put(message(LOCAL_USER))
    order = [(found.principal, found.peer) for found in served(inbox)]
    assert order[:3] == [(ALICE, b"1"), (BOB, b"1"), (LOCAL_USER, b"1")]
    assert [peer for _, peer in order[3:]] == [b"2", b"1", b"2", b"1", b"2"]
    assert inbox.next_due() is None


def test_a_key_that_has_had_its_time_waits_and_others_do_not() -> None:
    inbox = Inbox(always)
    inbox.spend(ALICE, 100.0)
    for who in (ALICE, BOB, LOCAL_USER):
        inbox.put(message(who))
    assert [found.principal for found in served(inbox)] == [BOB, LOCAL_USER]
    assert inbox.next_due() == inbox_module.LOOK_SECONDS  # no busy loop meanwhile


def test_a_clients_messages_beyond_what_may_wait_are_let_go_and_a_workers_are_not() -> None:
    inbox = Inbox(always)
    assert all(inbox.put(message(ALICE)) for _ in range(MOST_WAITING))
    assert not inbox.put(message(ALICE))
    assert inbox.put(message(BOB))
    assert inbox.has_room()
    assert inbox.put(message(BOX, role="worker", size=WAITING_BYTES))
    assert not inbox.has_room()  # no more is read, but what has come is taken
    assert inbox.put(message(BOX, role="worker"))
    assert len(served(inbox)) == MOST_WAITING + 3
    assert inbox.has_room()


def test_workers_that_leave_no_room_are_not_heard_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    inbox = Inbox(always)
    inbox.put(message(BOX, role="worker", size=WAITING_BYTES))
    assert inbox.floods() == []
    late = time.monotonic() + inbox_module.FLOOD_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: late)
    assert inbox.floods() == [BOX]
    assert inbox.has_room()
    assert not inbox.put(message(BOX, role="worker"))
    assert inbox.put(message(ALICE, role="worker"))


def test_who_leaves_answers_unread_waits_and_its_other_connections_do_not() -> None:
    inbox = Inbox(lambda who, peer: peer != b"deaf")
    for _ in range(MOST_UNANSWERED):
        assert inbox.put(message(ALICE, b"deaf"))
    assert not inbox.put(message(ALICE, b"deaf"))
    inbox.put(message(ALICE, b"2"))
    assert [found.peer for found in served(inbox)] == [b"2"]
    inbox.forget(b"deaf")
    assert served(inbox) == []
    assert inbox.next_due() is None

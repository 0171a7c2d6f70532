"""Answers that peers have not read yet bound what they get."""

from types import SimpleNamespace
from typing import Any

from orchestrator.principal import KeyHolder
from orchestrator.server.unread import PEER_BYTES, PRINCIPAL_BYTES, Unread

ALICE, BOB = KeyHolder("alice"), KeyHolder("bob")


def test_a_connection_and_a_key_have_limits_of_their_own() -> None:
    unread = Unread()
    unread.add(ALICE, b"1", PEER_BYTES)
    assert not unread.takes_answers(ALICE, b"1")
    assert unread.takes_answers(ALICE, b"2")
    for number in range(2, 2 + PRINCIPAL_BYTES // (PEER_BYTES - 1)):
        unread.add(ALICE, b"%d" % number, PEER_BYTES - 1)
    assert not unread.takes_answers(ALICE, b"2")
    assert unread.takes_answers(ALICE, b"new")  # which has asked for nothing yet
    assert unread.takes_answers(BOB, b"1")
    unread.read(ALICE, b"1", PEER_BYTES)
    assert unread.takes_answers(ALICE, b"1")


def test_what_is_tracked_counts_until_it_is_sent() -> None:
    unread, tracker = Unread(), SimpleNamespace(done=False)
    trackers: Any = [tracker]
    unread.add(ALICE, b"1", PEER_BYTES, trackers)
    assert not unread.takes_answers(ALICE, b"1")
    tracker.done = True
    assert unread.takes_answers(ALICE, b"1")


def test_peers_behind_a_door_that_has_come_anew_owe_nothing() -> None:
    unread = Unread()
    unread.add(ALICE, b"\x02a", PEER_BYTES)
    unread.add(ALICE, b"\x00b", PEER_BYTES)
    unread.forget_behind(b"\x02")
    assert unread.takes_answers(ALICE, b"\x02a")
    assert not unread.takes_answers(ALICE, b"\x00b")

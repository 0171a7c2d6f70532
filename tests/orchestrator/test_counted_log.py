"""Lines that peers can cause at will."""

import logging

import pytest

from orchestrator.counted_log import MOST_KINDS, SAY_SECONDS, CountedLog


def test_a_line_is_said_at_once_and_counted_for_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    counted = CountedLog(logging.getLogger("counted"), lambda: now)
    for _ in range(1000):
        counted.warn("a stranger knocked", "at 1.2.3.4")
    counted.tell()
    assert [record.getMessage() for record in caplog.records] == ["a stranger knocked (at 1.2.3.4)"]
    now = SAY_SECONDS
    counted.tell()
    assert "999 times more" in caplog.records[-1].getMessage()
    counted.warn("a stranger knocked")
    assert len(caplog.records) == 3
    for number in range(2 * MOST_KINDS):
        counted.warn(f"kind {number}")
    assert len(caplog.records) <= MOST_KINDS + 3

"""One process of the supervisor's: when it is started again, when never, and why it ended."""

import sys
from pathlib import Path

import pytest

from orchestrator.supervisor.child import BACKOFF_SECONDS, LOOK_AGAIN_SECONDS, MOST_KILLED, MOST_REFUSED, Child
from orchestrator.supervisor.supervisor import why
from protocol.errors import DoesNotFit, ModelMissing
from protocol.process import REPORT

RAISES = (
    "import sys; from protocol.process import report_end; from protocol.errors import {0}; sys.exit(report_end({1}))"
)


def child(folder: Path, code: str, **fields: object) -> Child:
    reading = 0
    return Child("c", None, ["-c", code], "", folder / "c.log", reading, **fields)


def ended(one: Child) -> Child:
    one.start()
    assert one.process
    one.process.wait(60)
    assert one.reap() is not None
    return one


def test_an_error_comes_across_as_a_report_whatever_the_log_says(tmp_path: Path) -> None:
    error = "DoesNotFit('too large', 'Use less.')"
    one = ended(child(tmp_path, RAISES.format("DoesNotFit", error) + "\n"))
    assert one.report
    assert (one.report.code, one.report.message) == ("does_not_fit", "too large")
    assert (one.exit_code, one.reason, one.wanted) == (5, "too large Use less.", False)
    told = why(one)
    assert isinstance(told, DoesNotFit)
    assert told.hint == "Use less."


def test_a_crash_is_reported_with_its_traceback_in_the_log(tmp_path: Path) -> None:
    one = ended(child(tmp_path, RAISES.format("BadRequest", "ValueError('a\\nb')")))
    assert one.report
    assert (one.report.code, one.reason) == ("crash", "ValueError: a b")
    assert "ValueError" in one.log.read_text()
    assert "can't start" in str(why(one))
    assert one.wanted


def test_without_a_report_the_logs_last_line_is_the_reason(tmp_path: Path) -> None:
    one = ended(child(tmp_path, "print('last words'); raise SystemExit(3)"))
    assert (one.report, one.reason) == (None, "exit code 3: last words")
    killed = ended(child(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert killed.reason == "killed by signal 9"


def test_what_is_no_report_counts_as_none(tmp_path: Path) -> None:
    one = ended(child(tmp_path, f"import os, sys; os.write(int(os.environ['{REPORT}']), b'{{}}'); sys.exit(1)"))
    assert one.report is None
    assert one.reason.startswith("exit code 1")


@pytest.mark.parametrize("code", [2, 4, 5, 8])
def test_what_another_try_cannot_mend_is_not_tried_again(code: int, tmp_path: Path) -> None:
    one = child(tmp_path, f"raise SystemExit({code})")
    assert not ended(one).wanted
    worked_before = child(tmp_path, f"raise SystemExit({code})", ever_proven=True)
    for _ in range(MOST_REFUSED - 1):
        assert ended(worked_before).wanted
    assert not ended(worked_before).wanted
    essential = child(tmp_path, f"raise SystemExit({code})", ever_proven=True, essential=True)
    for _ in range(MOST_REFUSED + 1):
        assert ended(essential).wanted


def test_the_same_failure_twice_is_enough_for_what_never_worked_and_kills_are_forgiven_longer(tmp_path: Path) -> None:
    one = child(tmp_path, "raise SystemExit(1)")
    assert ended(one).wanted
    assert not ended(one).wanted
    killed = child(tmp_path, "import os; os.kill(os.getpid(), 9)")
    for _ in range(MOST_KILLED - 1):
        assert ended(killed).wanted
    assert not ended(killed).wanted


def test_a_full_disk_is_waited_for_only_where_it_once_worked(tmp_path: Path) -> None:
    assert not ended(child(tmp_path, "raise SystemExit(7)")).wanted
    one = ended(child(tmp_path, "raise SystemExit(7)", ever_proven=True))
    assert one.wanted
    assert one.backoff() <= LOOK_AGAIN_SECONDS


def test_each_failure_in_a_row_waits_longer_and_a_proven_process_begins_anew(tmp_path: Path) -> None:
    one = child(tmp_path, "raise SystemExit(3)", ever_proven=True)
    waits = [ended(one).backoff() for _ in range(3)]
    assert waits == list(BACKOFF_SECONDS[:3])
    one.start()
    one.proven = True
    assert one.process
    one.process.wait(60)
    one.reap()
    assert (one.failures, one.backoff()) == (1, BACKOFF_SECONDS[0])


def test_a_restart_on_request_is_no_failure(tmp_path: Path) -> None:
    one = child(tmp_path, "import time; time.sleep(60)")
    one.start()
    one.terminate()
    assert one.process
    one.process.wait(60)
    one.reap()
    assert (one.reason, one.failures, one.wanted, one.restarts) == ("restarted on request", 0, True, 1)


def test_a_model_that_is_missing_is_said_as_the_process_said_it(tmp_path: Path) -> None:
    one = ended(child(tmp_path, RAISES.format("ModelMissing", "ModelMissing('no such model')")))
    assert isinstance(why(one), ModelMissing)
    assert sys.executable

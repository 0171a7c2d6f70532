"""A process that is asked gives its answer, the error that it reports, or the last that was heard of it."""

from pathlib import Path

import pytest

from orchestrator.short_process import EndedWithoutAnswer, answer_of
from protocol.errors import DoesNotFit

MODULES = {
    "answers": "import os, sys; print('noise', file=sys.stderr); os.write(1, sys.argv[1].encode())",
    "refuses": "import sys; from protocol.errors import DoesNotFit; from protocol.process import report_end\n"
    "sys.exit(report_end(DoesNotFit('It is too large.', 'Take a smaller one.')))",
    "crashes": "import sys; from protocol.process import report_end\n"
    "sys.exit(report_end(ZeroDivisionError('by zero')))",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "unreported": "raise SystemExit('no such thing')",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in MODULES.items():
        (tmp_path / f"short_{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_the_answer_is_what_was_written() -> None:
    assert answer_of("short_answers", ["what"]) == b"what"


def test_an_error_that_is_reported_is_raised_as_it_was() -> None:
    with pytest.raises(DoesNotFit, match=r"It is too large\. Take a smaller one\."):
        answer_of("short_refuses", [])


@pytest.mark.parametrize(
    ("name", "words"),
    [("crashes", "ZeroDivisionError: by zero"), ("killed", "exit code -9"), ("unreported", "no such thing")],
)
def test_any_other_end_is_told_in_one_line(name: str, words: str) -> None:
    with pytest.raises(EndedWithoutAnswer) as caught:
        answer_of(f"short_{name}", [])
    assert str(caught.value) == words

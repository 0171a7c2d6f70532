"""The process from which workers are forked."""

import importlib.util
import sys
from pathlib import Path

import pytest

from workers.runtime import fork_server


def test_torchao_is_left_to_the_workers_that_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import brings up CUDA, which no fork survives."""
    (tmp_path / "looks_for_torchao.py").write_text(
        'import importlib.util\nFOUND = importlib.util.find_spec("torchao") is not None\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fork_server, "EVERYTHING", ("looks_for_torchao",))
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    fork_server.import_everything()
    assert not sys.modules["looks_for_torchao"].FOUND
    assert "torchao" not in sys.modules
    assert importlib.util.find_spec("torchao") is not None

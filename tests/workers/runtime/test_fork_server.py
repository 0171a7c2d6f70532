"""The process from which workers are forked."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.model_spec import ModelSpec
from protocol.worker_spec import WorkerSpec
from workers.runtime import fork_server

START = """
import sys
from protocol.worker_spec import PROCESS_SPEC
from workers.runtime.launch import run
code = run(PROCESS_SPEC.validate_json(sys.argv[1]))
print(code, "torchao" in sys.modules)
"""


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


def test_a_worker_that_forks_its_ranks_leaves_torchao_alone_too(tmp_path: Path) -> None:
    """Started by itself, with no fork server."""
    spec = WorkerSpec(
        stage="denoise", name="denoise-1", model=ModelSpec(name=str(tmp_path / "nothing")), device="cpu",
        speedups=("denoise:parallel=tensor-2",),
    )  # fmt: skip
    command = [sys.executable, "-c", START, spec.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 False" in done.stdout, done.stderr
    assert "True" not in done.stdout

"""What each folder must not know, and what must be nowhere: as far as linters see it, that they do see it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {  # what ruff's banned imports can't see: methods and arguments
    "pickles": re.compile(r"allow_pickle=True|weights_only=False|\b(recv|send)_pyobj\b"),
    "code of a model's": re.compile(r"trust_remote_code=True"),
    "other weights": re.compile(r"use_safetensors=(False|None)"),
}
SOURCES = [p for name in ("protocol", "orchestrator", "workers", "scripts") for p in (ROOT / name).rglob("*.py")]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_received_can_be_executed(what: str) -> None:
    found = [str(p) for p in [*SOURCES, ROOT / "triptych.py"] if FORBIDDEN[what].search(p.read_text())]
    assert found == []


def test_orchestrator_protocol_and_the_public_face_never_import_torch() -> None:
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for name in ("protocol", "orchestrator")
        for p in (ROOT / name).rglob("*.py")
        if p.stem not in ("__init__", "__main__")
    ]
    code = f"import sys, importlib\nfor m in {[*modules, 'triptych', 'workers.command']}: importlib.import_module(m)\n"
    code += "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys(), 'torch came in'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_weights_are_safetensors_only() -> None:
    kinds = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    assert [name for name in tracked if name.endswith(kinds)] == []


def test_the_command_line_loads_no_slow_libraries() -> None:
    code = "import sys, orchestrator.cli, orchestrator.cli.submit, orchestrator.cli.jobs\n"
    code += "assert not {'torch', 'rich', 'PIL.Image', 'numpy', 'orchestrator.storage.job_store'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def copied(folder: Path) -> Path:
    """The tree, to plant violations in."""
    for name in ("protocol", "orchestrator", "workers", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "demo_model"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


PLANTED = {
    "upwards": ("orchestrator/memory/ledger.py", "from orchestrator.server import loop"),
    "sideways": ("workers/errors.py", "from orchestrator import job"),
    "torch in the orchestrator": ("orchestrator/job.py", "import torch"),
    "a clock in what is pure": ("orchestrator/dispatch/transitions.py", "import time"),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[pytest.mark.all] if what != "upwards" else []) for what in PLANTED]
)
def test_the_import_rules_refuse_a_planted_violation(what: str, tmp_path: Path) -> None:
    name, line = PLANTED[what]
    tree = copied(tmp_path)
    (tree / name).write_text(f"{line}\n" + (tree / name).read_text())
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


@pytest.mark.parametrize(
    "line", ["import pickle", "import os; os.system('x')", "import torch; torch.load('x')", "eval('1')"]
)
def test_the_linter_refuses_what_would_execute(line: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(f"{line}\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert re.search(r"TID251|S102|S307|S605", done.stdout), done.stdout

"""What each folder must not know, and what must be nowhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "pickle": re.compile(
        r"\b(import|from) (pickle|cPickle|cloudpickle|dill|joblib|shelve|marshal)\b|allow_pickle=True"
    ),
    "pickles on sockets": re.compile(r"(recv|send)_pyobj|multiprocessing\.(connection|Queue|Pipe|managers)"),
    "torch.load": re.compile(r"\btorch\.(load|save)\(|\.load_state_dict\(\s*torch|weights_only=False"),
    "eval": re.compile(r"(?<![\w.])(eval|exec|__import__)\("),
    "code of a model's": re.compile(r"trust_remote_code=True"),
    "other weights": re.compile(r"use_safetensors=(False|None)"),
    "shell": re.compile(r"shell=True|os\.(system|popen)\(|getoutput\("),
    "yaml": re.compile(r"yaml\.(unsafe_)?load\("),
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

"""The folder of a stack, or of a host's agent."""

import os
import subprocess
import sys
from pathlib import Path

from orchestrator.state_folder import StackFolder

HOLD = """
import os, signal, sys
from pathlib import Path
from orchestrator.state_folder import StackFolder
held = StackFolder(Path(sys.argv[1])).lock("supervisor")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_held_a_folder_before_is_known_until_the_next_one_does(tmp_path: Path) -> None:
    folder = StackFolder(tmp_path)
    assert folder.last_holder("supervisor") == 0
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)])
    holder.wait()
    assert folder.last_holder("supervisor") == holder.pid
    with folder.lock("supervisor"):
        assert folder.last_holder("supervisor") == os.getpid()

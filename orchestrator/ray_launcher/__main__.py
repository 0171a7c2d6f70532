"""`python -m orchestrator.ray_launcher SPEC`: the launcher's process, as the supervisor starts it; SPEC is JSON."""

import signal
import sys

from orchestrator.pulse import Pulse
from orchestrator.settings import RaySpec
from orchestrator.state_folder import StackFolder
from protocol.process import run_process


def launch(spec: RaySpec) -> None:
    """Look after the cluster until told to stop."""
    from orchestrator.ray_launcher.launcher import RayLauncher, connect

    launcher = RayLauncher(StackFolder(spec.state), spec.settings, Pulse.inherited().beat)
    connect(spec.settings.ray or "auto")
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own meanwhile
        signal.signal(number, lambda number, frame: launcher.stop())
    launcher.run()


sys.exit(run_process("ray", lambda spec: launch(RaySpec.model_validate_json(spec))))

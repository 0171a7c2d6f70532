"""`python -m orchestrator.doors SPEC`: a door's process, as the supervisor starts it; SPEC is JSON."""

import signal
import sys

from orchestrator.doors.door import Door, limit_resources
from orchestrator.settings import DoorSpec
from protocol.process import run_process


def stand(text: str) -> None:
    """Stand between TCP and the orchestrator until told to stop."""
    spec = DoorSpec.model_validate_json(text)
    door = Door(spec, limit_resources(spec.role))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, door.stop)
    door.run()


sys.exit(run_process("door", stand))

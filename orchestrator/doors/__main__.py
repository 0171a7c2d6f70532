"""`python -m orchestrator.doors SPEC`: a door's process, as the supervisor starts it; SPEC is JSON."""

import os
import signal
import sys

from orchestrator.doors.door import Door, limit_resources
from orchestrator.settings import DoorSpec
from protocol.process import end_with_parent, log_to_stderr, report_end


def main() -> int:
    end_with_parent()
    log_to_stderr("door", limited=True)
    os.umask(0o077)
    try:
        spec = DoorSpec.model_validate_json(sys.argv[1])
        door = Door(spec, limit_resources(spec.role))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, door.stop)
        door.run()
    except BaseException as error:
        return report_end(error)
    return 0


sys.exit(main())

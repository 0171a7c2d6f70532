"""`python -m orchestrator.cli`: the same as `triptych`, for processes that the supervisor starts."""

from orchestrator.cli import main

main()

"""`python -m orchestrator.server SPEC`: the orchestrator's process, as the supervisor starts it; SPEC is JSON."""

import functools
import signal
import sys

from orchestrator.gpu_driver import used_bytes
from orchestrator.memory.ledger import Account, no_driver
from orchestrator.server.host_links import HOST
from orchestrator.server.loop import Server
from orchestrator.settings import AccountSettings, OrchestratorSpec
from orchestrator.state_folder import StackFolder
from protocol.client.endpoints import Endpoints
from protocol.gpu_memory import GpuId
from protocol.process import run_process


def orchestrate(spec: OrchestratorSpec) -> None:
    """Serve until told to stop."""
    folder = StackFolder(spec.state)
    folder.create()
    if spec.clients.startswith(f"ipc://{folder.path.resolve() / 'sockets'}"):
        folder.socket_folder()  # somebody may have removed it
    with folder.lock("orchestrator"):
        accounts = {GpuId(HOST, index): account(index, gpu) for index, gpu in spec.settings.gpus.items()}
        server = Server(
            folder, Endpoints(spec.clients, spec.workers), spec.settings, accounts, spec.doors, spec.guarded
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.stop)
        server.run()


def account(index: int, gpu: AccountSettings) -> Account:
    used = functools.partial(used_bytes, index) if gpu.driver else no_driver
    return Account(gpu.budget, gpu.foreign, used, gpu.kept, gpu.name)


sys.exit(run_process("orchestrator", lambda spec: orchestrate(OrchestratorSpec.model_validate_json(spec))))

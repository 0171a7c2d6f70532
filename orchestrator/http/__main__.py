"""`python -m orchestrator.http SPEC`: the HTTP process, as the supervisor starts it; SPEC is JSON."""

import logging
import socket
import sys

import uvicorn

from orchestrator.http.app import create_app
from orchestrator.http.impatient import Impatient
from orchestrator.pulse import Pulse
from orchestrator.settings import HttpSpec
from protocol.process import run_process

MOST_CONNECTIONS = 2000  # beyond which whoever comes is told 503
GRACE_SECONDS = 3  # that requests have to end when the stack does


def serve(spec: HttpSpec) -> None:
    """Serve until told to stop."""
    listening = socket.socket(fileno=spec.socket)
    app = create_app(spec, Pulse.inherited())
    settings = spec.settings
    certificate, private_key = settings.http_certificate, settings.http_private_key
    config = uvicorn.Config(
        app, http=Impatient, lifespan="on", log_config=None, access_log=False, server_header=False,
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=GRACE_SECONDS, timeout_keep_alive=75,
        proxy_headers=False,
        ssl_certfile=str(certificate) if certificate else None, ssl_keyfile=str(private_key) if private_key else None,
    )  # fmt: skip
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    uvicorn.Server(config).run(sockets=[listening])


sys.exit(run_process("http", lambda spec: serve(HttpSpec.model_validate_json(spec))))

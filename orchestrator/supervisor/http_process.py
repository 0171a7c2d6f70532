"""The HTTP process: its listening socket is the supervisor's, so that connections wait while it is started again."""

import importlib.util
import os
import socket
import ssl

from orchestrator.pulse import PULSE, PulseWatch
from orchestrator.settings import HttpSettings, HttpSpec
from orchestrator.state_folder import StackFolder
from orchestrator.supervisor.child import Child
from protocol.errors import BadRequest

STILL_SECONDS = 30.0  # without a turn of its loop, after which it hangs
MOST_PORT = 65535
BACKLOG = 1024  # connections that may wait to be taken
NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


class HttpSocket:
    """The socket at which HTTP is served, and its address as others call it."""

    def __init__(self, settings: HttpSettings) -> None:
        """Listen at the address of the settings; BadRequest where that can't be, or what serves there is missing."""
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            raise BadRequest(f"--http needs {missing[0]}, which is not installed.", "pip install 'triptych[http]'")
        check_certificate(settings)
        self.settings = settings
        host, port = settings.http_host, (settings.http or "").rpartition(":")[2]
        try:
            if int(port) > MOST_PORT:
                raise OverflowError(f"there is no port {port}")
            family, *_, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
            self.socket = socket.create_server(where[:2], family=family, backlog=BACKLOG)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadRequest(
                f"Nothing can listen at {settings.http!r}: {reason}.", "Give another --http HOST:PORT."
            ) from error
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if settings.http_certificate else 'http'}://{name}:{self.socket.getsockname()[1]}"


def check_certificate(settings: HttpSettings) -> None:
    """Raise BadRequest where TLS is asked for with files that don't serve."""
    certificate, key = settings.http_certificate, settings.http_private_key
    for file in (certificate, key):
        if file is not None and not file.is_file():
            raise BadRequest(f"There is no file {str(file)!r}.", "Give a PEM file.")
    if certificate is None:
        if key is not None:
            raise BadRequest(f"There is a key {str(key)!r}, and no certificate.", "Give one: --http-certificate FILE")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "it can't be read"
        given = f"{str(certificate)!r}" + (f" with {str(key)!r}" if key else "")
        raise BadRequest(
            f"{given} can't be used for TLS: {reason.lower().replace('_', ' ')}.",
            "Give a PEM certificate with its chain, and its own private key without a passphrase, in the same file or "
            "as --http-private-key.",
        ) from error


class HttpProcess:
    def __init__(self, listening: HttpSocket, folder: StackFolder, endpoint: str, lifeline: int) -> None:
        self._listening, self._pulse = listening, PulseWatch()
        number = listening.socket.fileno()
        spec = HttpSpec(state=folder.path, endpoint=endpoint, socket=number, settings=listening.settings)
        self.child = Child(
            "http", None, ["-m", "orchestrator.http"], spec.model_dump_json(), folder.log("http"), lifeline,
            essential=True, descriptors=(number, self._pulse.descriptor),
            environment={PULSE: str(self._pulse.descriptor)}, prepare=self._begin,
        )  # fmt: skip

    def _begin(self) -> None:
        os.ftruncate(self._pulse.descriptor, 0)

    def look(self) -> None:
        """Note that it works, which it shows by each turn of its loop; end it where it hangs."""
        child = self.child
        if child.state != "running":
            return
        still = self._pulse.still_for()
        if self._pulse.beaten:
            child.proven = child.ever_proven = True
        if child.proven and still > STILL_SECONDS:
            child.put_down(f"it did nothing for {STILL_SECONDS:g} s")

    def close(self) -> None:
        self._listening.socket.close()
        self._pulse.close()

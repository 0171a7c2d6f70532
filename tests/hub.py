"""A hub of one model, served from a folder: enough of the API for huggingface_hub to look, download and go on."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`cut` ends the first download of a file after so many bytes; `gated` lets nobody have weights."""

    folder: Path
    repo: str = "tiny/model"
    cut: dict[str, int] = field(default_factory=dict)  # bytes by file
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)  # told in place of the real ones
    asked: list[tuple[str, str]] = field(default_factory=list)  # (file, range) of each download
    endpoint: str = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def size(self, name: str) -> int:
        return self.sizes.get(name, (self.folder / name).stat().st_size)


@contextlib.contextmanager
def fake_hub(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            if path.startswith(f"{hub.repo}/resolve/"):
                self.file(path.split("/", 4)[4], body)
            elif path.startswith(f"api/models/{hub.repo}/tree/"):
                rows = [{"type": "file", "path": str(f.relative_to(hub.folder)), "oid": etag(f),
                         "size": hub.size(str(f.relative_to(hub.folder)))} for f in hub.files()]  # fmt: skip
                self.json(rows, body)
            elif path.startswith(f"api/models/{hub.repo}"):
                rows = [{"rfilename": str(f.relative_to(hub.folder))} for f in hub.files()]
                self.json({"id": hub.repo, "sha": COMMIT, "siblings": rows, "tags": [], "private": False}, body)
            else:
                self.error("RepoNotFound", 404)

        def json(self, found: object, body: bool) -> None:
            data = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def error(self, code: str, status: int) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def file(self, name: str, body: bool) -> None:
            path = hub.folder / name
            if hub.gated:
                self.error("GatedRepo", 403)
                return
            if not path.is_file():
                self.error("EntryNotFound", 404)
                return
            data, wanted = path.read_bytes(), self.headers.get("Range", "")
            start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"{etag(path)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str((hub.size(name) if not body else len(data)) - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if body:
                hub.asked.append((name, wanted))
                end = hub.cut.pop(name, len(data))
                self.wfile.write(data[start:end])
                self.close_connection = end < len(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

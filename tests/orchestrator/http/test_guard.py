"""Who comes in by HTTP, and from where: the guard before a small application."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from orchestrator.access import AllowedKeys, KeyFolder
from orchestrator.http.faults import Refused, tell
from orchestrator.http.guard import Guard
from orchestrator.settings import HttpSettings
from protocol.errors import Conflict

LOCAL, ELSEWHERE = "127.0.0.1:7870", "0.0.0.0:7870"
Ask = Callable[..., httpx.Response]


async def echo(request: Request) -> JSONResponse:
    return JSONResponse({"caller": request.state.caller, "bytes": len(await request.body())})


@pytest.fixture
def keys(tmp_path: Path) -> KeyFolder:
    return KeyFolder(tmp_path / "keys")


def asking(keys: KeyFolder, address: str = LOCAL, **settings: Any) -> Ask:
    """A client of an application behind a guard, whose base address is `address`."""
    routes = [Route("/{path:path}", echo, methods=["GET", "POST"])]
    app = Starlette(routes=routes, exception_handlers={Refused: tell})
    guard = Guard(app, HttpSettings(http=address, **settings), AllowedKeys(keys))

    def ask(method: str = "GET", path: str = "/v1/models", **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(guard)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:7870") as client:
                return await client.request(method, path, **options)

        return asyncio.run(once())

    return ask


def test_the_loopback_address_needs_no_key_and_takes_any(keys: KeyFolder) -> None:
    ask = asking(keys)
    assert ask().json()["caller"] == ""
    assert ask(headers={"Authorization": "Bearer sk-anything"}).json()["caller"] == ""
    token = keys.issue_token("alice")
    assert ask(headers={"Authorization": f"Bearer {token}"}).json()["caller"] == "alice"


def test_elsewhere_a_key_is_needed_until_it_is_revoked(keys: KeyFolder) -> None:
    ask = asking(keys, ELSEWHERE)
    token = keys.issue_token("alice")
    refused = ask()
    assert (refused.status_code, "Basic" in refused.headers["www-authenticate"]) == (401, True)
    assert refused.json()["error"]["type"] == "authentication_error"
    assert ask(headers={"Authorization": f"Bearer {token}"}).json()["caller"] == "alice"
    assert ask(auth=("anybody", token)).json()["caller"] == "alice"
    assert ask(headers={"Authorization": f"bearer  {token} "}).json()["caller"] == "alice"
    for wrong in (f"Bearer {token}x", "Bearer ", "Basic !", f"Basic {base64.b64encode(b'no colon').decode()}", token):
        assert ask(headers={"Authorization": wrong}).status_code == 401
    assert ask(path="/healthz").status_code == 200
    keys.revoke("alice")
    assert ask(headers={"Authorization": f"Bearer {token}"}).status_code == 401


def test_the_list_of_keys_holds_no_token(keys: KeyFolder, tmp_path: Path) -> None:
    token = keys.issue_token("alice", 2.0)
    assert token not in (tmp_path / "keys" / "allowed.json").read_text()
    with pytest.raises(Conflict):
        keys.issue_token("alice")


def test_one_name_comes_by_curve_and_by_http(keys: KeyFolder) -> None:
    key = keys.issue("alice", "client", "tcp://127.0.0.1:1")
    allowed = AllowedKeys(keys)
    token = keys.issue_token("alice")
    allowed.look_again()
    assert (entry := allowed.entry(key.public, "client"))
    assert allowed.holder_of(token) == entry.name == "alice"
    assert allowed.holder_of("") is None
    assert allowed.entry("", "client") is None


@pytest.mark.parametrize("header", ["Basic \xe9", "Basic =", "Bearer \xff", "\xe9", ""])
def test_headers_of_any_bytes_are_no_key(keys: KeyFolder, header: str) -> None:
    assert asking(keys, ELSEWHERE)(headers={b"Authorization": header.encode("latin-1")}).status_code == 401


def test_guessing_is_limited_as_asking_is(keys: KeyFolder) -> None:
    ask = asking(keys, ELSEWHERE, http_rate=0.2)
    assert [ask(headers={"Authorization": "Bearer no"}).status_code for _ in range(3)] == [401, 401, 429]


def test_a_proxy_on_this_host_does_not_make_strangers_local(keys: KeyFolder) -> None:
    ask = asking(keys)
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Proto", "CF-Connecting-IP"):
        assert ask(headers={name: "for=192.0.2.1"}).status_code == 401
    token = keys.issue_token("alice")
    behind = {"X-Forwarded-For": "192.0.2.1", "Authorization": f"Bearer {token}"}
    assert ask(headers=behind).json()["caller"] == "alice"
    assert asking(keys, http_keys="required")().status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7870", "127.0.0.1.evil.example", "[::2]:7870", ""])
def test_names_that_are_not_this_hosts_are_refused(keys: KeyFolder, host: str) -> None:
    assert asking(keys)(headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:7870", "LOCALHOST:1", "[::1]:7870", "pictures.lan"])
def test_names_that_are_this_hosts_are_not(keys: KeyFolder, host: str) -> None:
    assert asking(keys, http_hosts=("pictures.lan",))(headers={"Host": host}).status_code == 200


def test_other_sites_pages_change_nothing(keys: KeyFolder) -> None:
    ask = asking(keys, http_origins=("https://friend.example",))
    for origin in ("https://evil.example", "null", "http://localhost:9999"):
        assert ask("POST", headers={"Origin": origin}).status_code == 403
    assert ask("POST", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    for origin in ("http://localhost:7870", "https://friend.example"):
        assert ask("POST", headers={"Origin": origin}).status_code == 200
    assert ask(headers={"Origin": "https://evil.example"}).status_code == 200  # which its page can't read


def test_bodies_are_limited_whether_or_not_they_say_their_length(keys: KeyFolder) -> None:
    ask = asking(keys, http_body=1000)
    assert ask("POST", content=b"x" * 1000).json()["bytes"] == 1000
    assert ask("POST", content=b"x" * 1001).status_code == 413

    async def pieces() -> Any:
        for _ in range(11):
            yield b"x" * 100

    assert ask("POST", content=pieces()).status_code == 413
    assert "--http-body" in ask("POST", path="/sdapi/v1/txt2img", content=b"x" * 1001).json()["detail"]


def test_rates_are_limited_by_key_and_address(keys: KeyFolder) -> None:
    ask = asking(keys, http_rate=0.2)  # two at once
    token = keys.issue_token("alice")
    assert [ask().status_code for _ in range(3)] == [200, 200, 429]
    assert ask(headers={"Authorization": f"Bearer {token}"}).status_code == 200
    refused = ask()
    assert (refused.headers["retry-after"], refused.json()["error"]["type"]) == ("1", "rate_limit_error")


def test_browsers_are_told_to_take_nothing_for_something_else(keys: KeyFolder) -> None:
    headers = asking(keys)().headers
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")


def test_what_comes_of_a_refused_body_is_read_after_the_answer(keys: KeyFolder) -> None:
    """A connection that is closed with bytes unread is reset, and a proxy loses the answer."""
    guard = Guard(Starlette(), HttpSettings(http=LOCAL, http_body=10), AllowedKeys(keys))
    order: list[str] = []

    async def receive() -> dict[str, Any]:
        order.append("read")
        return {"type": "http.request", "body": b"x" * 8, "more_body": order.count("read") < 3}

    async def send(message: dict[str, Any]) -> None:
        order.append(f"{message['type']} {message.get('status', message.get('more_body', False))}")

    headers = [(b"host", b"localhost"), (b"content-length", b"24")]
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers, "client": ("127.0.0.1", 1)}
    asyncio.run(guard(scope, receive, send))
    last = "http.response.body False"
    assert order == ["http.response.start 413", "http.response.body True", "read", "read", "read", last]

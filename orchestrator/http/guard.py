"""Who may come in by HTTP: keys, hosts, origins, sizes and rates, looked at before a request is read."""

import base64
import binascii
import ipaddress
from collections.abc import Mapping
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.access import AllowedKeys
from orchestrator.http.faults import Refused, response_of
from orchestrator.settings import HttpSettings
from orchestrator.token_bucket import TokenBucket
from protocol.errors import TriptychError
from protocol.units import format_bytes

OPEN = ("/healthz", "/readyz")  # to all who can reach it
SIGNED = "/pictures/"  # what lies below is let out by a link's signature
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
BURST_SECONDS = 10.0  # of a caller's rate, at once
MOST_CALLERS = 10_000  # whose rates are remembered
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
CHALLENGE = {"WWW-Authenticate": 'Basic realm="Triptych", charset="UTF-8"'}
NEEDS_KEY = "On the stack's host: triptych keys new NAME --http"
POLICY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
}


class Guard:
    """An ASGI middleware; what it lets in has its caller in the request's state: a key's name, or "" for this user."""

    def __init__(self, app: ASGIApp, settings: HttpSettings, keys: AllowedKeys) -> None:
        self._app, self._settings, self._keys = app, settings, keys
        host = (settings.http or "").rpartition(":")[0].strip("[]")
        self._loopback = is_loopback(host)
        self._hosts = {name.lower() for name in (*LOCAL_NAMES, *settings.http_hosts)}
        self._origins = {origin.rstrip("/").lower() for origin in settings.http_origins}
        self._rates: dict[str, TokenBucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(scope, headers)
            scope.setdefault("state", {})["caller"] = caller = self._caller(scope, headers)
            self._check_rate(caller or address_of(scope))
            received = BodyLimit(receive, headers, self._settings.http_body)
        except TriptychError as error:
            await response_of(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, received, with_policy(send))

    # -- from where -----------------------------------------------------------------------------

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Refuse names that are not this host's, where no key is needed, and other sites' pages that change things."""
        named = headers.get("host", "")
        host = host_of(named)
        if self._loopback and not self._needs_key and host not in self._hosts:
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"{host[:100]!r} is no name of this host's.",
                "Start the stack with --http-host NAME if it is.",
            )
        origin = headers.get("origin")
        strange = headers.get("sec-fetch-site") == "cross-site"
        if origin is not None:
            own = origin.partition("://")[2].lower() == named.lower()
            strange = not own and origin.lower() not in self._origins
        if strange and scope["method"] not in SAFE:
            raise Refused(
                HTTPStatus.FORBIDDEN,
                f"A page of {(origin or 'another site')[:100]} may change nothing here.",
                "Start the stack with --http-origin ORIGIN if it may.",
            )

    # -- who ------------------------------------------------------------------------------------

    @property
    def _needs_key(self) -> bool:
        return not self._loopback or self._settings.http_keys == "required"

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Return the name of the key that a request comes with; "" for this machine's user. Refused."""
        name = self._key_of(headers.get("authorization", ""))
        if name is not None:
            return name
        if scope["path"] in OPEN or scope["path"].startswith(SIGNED) or scope["method"] == "OPTIONS":
            return ""
        if self._needs_key:
            given = "This key is not let in." if "authorization" in headers else "A key is needed."
            raise Refused(HTTPStatus.UNAUTHORIZED, given, NEEDS_KEY, CHALLENGE)
        if "x-forwarded-for" in headers or "forwarded" in headers:
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "This comes through a proxy, so that whoever reaches the proxy would come in.",
                "Start the stack with --http-keys required, and make a key: triptych keys new NAME --http",
                CHALLENGE,
            )
        return ""

    def _key_of(self, authorization: str) -> str | None:
        """Return the name of the key in an Authorization header: as a bearer, or as Basic's password."""
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return None
        elif kind.lower() != "bearer":
            return None
        self._keys.look_again()
        return self._keys.holder_of(value.strip())

    def _check_rate(self, who: str) -> None:
        rate = self._settings.http_rate
        if len(self._rates) >= MOST_CALLERS:
            full = rate * BURST_SECONDS
            self._rates = {name: bucket for name, bucket in self._rates.items() if bucket.left() < full}
        bucket = self._rates.setdefault(who, TokenBucket(rate, rate * BURST_SECONDS))
        if not bucket.take():
            raise Refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"More than {rate:g} requests a second come from you.",
                "Ask again later, and less often.",
                {"Retry-After": "1"},
            )


class BodyLimit:
    """Receives a request's body, as far as it may go; Refused beyond that."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], most: int) -> None:
        self._receive, self._most, self._had = receive, most, 0
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise self._too_large()

    async def __call__(self) -> Message:
        message = await self._receive()
        self._had += len(message.get("body", b""))
        if self._had > self._most:
            raise self._too_large()
        return message

    def _too_large(self) -> Refused:
        most = format_bytes(self._most)
        return Refused(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The request's body has more than {most}.",
            "Send less, or start the stack with a larger --http-body.",
            {"Connection": "close"},
        )


def with_policy(send: Send) -> Send:
    """Send a response with the headers that keep browsers from taking it for something else."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message["headers"]}
            more = [(n.lower().encode(), v.encode()) for n, v in POLICY.items() if n.lower().encode() not in there]
            message["headers"] = [*message["headers"], *more]
        await send(message)

    return sending


def host_of(named: str) -> str:
    """Return the host in a Host header, without its port."""
    if named.startswith("["):
        return named[1:].partition("]")[0].lower()
    return named.partition(":")[0].lower()


def address_of(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The guard of who may come in by HTTP: keys, hosts, origins, sizes and rates, looked at before a request is read."""

import asyncio
import base64
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
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
LINGER_SECONDS = 5.0  # that the rest of a refused request's body is read for
MOST_LINGERING = 64
MOST_OPEN = 256  # requests of one key or address, streams among them
OF_PROXIES = (  # headers that say that a request was sent on for somebody else
    "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "forwarded", "x-real-ip", "via", "cf-connecting-ip",
    "true-client-ip",
)  # fmt: skip
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
        self._hosts = {name.lower() for name in (*LOCAL_NAMES, *settings.http_hosts)}
        self._origins = {normal(origin) for origin in settings.http_origins}
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()  # the one that asked last comes last
        self._lingering = 0  # refused requests whose rest is read
        self._open: Counter[str] = Counter()  # requests that are not answered to their end, by whoever they are of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        address = address_of(scope)
        try:
            with self._charged(address):
                self._check_host(scope, headers)
                caller = self._caller(scope, headers)
            scope.setdefault("state", {})["caller"] = caller
            who = f"key {caller}" if caller else address
            self._take(who)
            received = BodyLimit(receive, headers, self._settings.http_body)
            if self._open[who] >= MOST_OPEN:
                raise too_often(f"More than {MOST_OPEN} requests of yours are open.")
        except TriptychError as error:
            refusal = response_of(error, scope["path"])
            if self._lingering >= MOST_LINGERING:
                await refusal(scope, receive, send)
                return
            self._lingering += 1
            try:
                await answer_early(refusal, scope, receive, send)
            finally:
                self._lingering -= 1
            return
        self._open[who] += 1
        try:
            await self._app(scope, received, with_policy(send))
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]

    @contextlib.contextmanager
    def _charged(self, address: str) -> Iterator[None]:
        """Count what is refused against its address, too, so that guessing is no quicker than asking."""
        try:
            yield
        except Refused:
            self._take(address)
            raise

    # -- from where -----------------------------------------------------------------------------

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Refuse names that are not this host's, where no key is needed, and other sites' pages that change things."""
        named = headers.get("host", "")
        host = host_of(named)
        if not self._settings.http_needs_keys and host not in self._hosts:
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

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Return the name of the key that a request comes with; "" for this machine's user. Refused."""
        name = self._key_of(headers.get("authorization", ""))
        if name is not None:
            return name
        if scope["path"] in OPEN or scope["path"].startswith(SIGNED) or scope["method"] == "OPTIONS":
            return ""
        if self._settings.http_needs_keys:
            given = "This key is not let in." if "authorization" in headers else "A key is needed."
            raise Refused(HTTPStatus.UNAUTHORIZED, given, NEEDS_KEY, CHALLENGE)
        if any(name in headers for name in OF_PROXIES):
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
            except ValueError:
                return None
        elif kind.lower() != "bearer":
            return None
        self._keys.look_again()
        return self._keys.holder_of(value.strip())

    def _take(self, who: str) -> None:
        """Count a request against whoever it is of; Refused where that is too often."""
        rate = self._settings.http_rate
        bucket = self._rates.setdefault(who, TokenBucket(rate, rate * BURST_SECONDS))
        self._rates.move_to_end(who)
        if len(self._rates) > MOST_CALLERS:
            self._rates.popitem(last=False)
        if not bucket.take():
            raise too_often(f"More than {rate:g} requests a second come from you.")


async def answer_early(response: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before a request's body was read, and read what comes of it for a while, to no purpose.

    A connection that is closed with bytes unread is reset, and a proxy then loses the answer that it has not yet read.
    """

    async def hold(message: Message) -> None:
        body = message["type"] == "http.response.body"
        await send({**message, "more_body": True} if body else message)

    await response(scope, receive, hold)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})


def too_often(words: str) -> Refused:
    return Refused(HTTPStatus.TOO_MANY_REQUESTS, words, "Ask again later, and less often.", {"Retry-After": "1"})


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


def normal(origin: str) -> str:
    """Return an origin as browsers write it."""
    return origin.rstrip("/").lower()


def host_of(named: str) -> str:
    """Return the host in a Host header, without its port."""
    if named.startswith("["):
        return named[1:].partition("]")[0].lower()
    return named.partition(":")[0].lower()


def address_of(scope: Scope) -> str:
    """Return whence a request comes; of IPv6 the network, of which one host has all addresses."""
    client = scope.get("client")
    host = str(client[0]) if client else ""
    return ":".join(host.split(":")[:4]) if ":" in host else host

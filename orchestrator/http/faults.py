"""Errors as HTTP tells them: the status, and the form that the clients of each path read."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from protocol.errors import (
    BadRequest,
    Conflict,
    DoesNotFit,
    Forbidden,
    JobCancelled,
    JobFailed,
    ModelMissing,
    NoStack,
    NotFound,
    ProtocolError,
    QueueFull,
    StateUnusable,
    TriptychError,
    WaitTimeout,
)

RETRY_SECONDS = {NoStack: 2, QueueFull: 5, StateUnusable: 30}  # after which it may be otherwise
STATUSES: dict[type[TriptychError], HTTPStatus] = {
    BadRequest: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    Forbidden: HTTPStatus.FORBIDDEN,
    NoStack: HTTPStatus.SERVICE_UNAVAILABLE,
    ModelMissing: HTTPStatus.SERVICE_UNAVAILABLE,
    DoesNotFit: HTTPStatus.BAD_REQUEST,
    QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    StateUnusable: HTTPStatus.SERVICE_UNAVAILABLE,
    JobFailed: HTTPStatus.INTERNAL_SERVER_ERROR,
    JobCancelled: HTTPStatus.CONFLICT,
    WaitTimeout: HTTPStatus.GATEWAY_TIMEOUT,
    ProtocolError: HTTPStatus.BAD_REQUEST,
}
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(TriptychError):
    """A request that HTTP itself refuses: without a key, too large, too often, for another host."""

    code = "refused"

    def __init__(
        self, status: HTTPStatus, message: str, hint: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status, self.headers = status, dict(headers or {})


class BadField(BadRequest):
    """A field of a request that can't be right; `field` is its name there."""

    def __init__(self, field: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.field = field


def status_of(error: TriptychError) -> HTTPStatus:
    if isinstance(error, Refused):
        return error.status
    kinds = [kind for kind in type(error).__mro__ if kind in STATUSES]
    return STATUSES[kinds[0]] if kinds else HTTPStatus.INTERNAL_SERVER_ERROR


def headers_of(error: TriptychError) -> dict[str, str]:
    if isinstance(error, Refused):
        return error.headers
    seconds = [RETRY_SECONDS[kind] for kind in type(error).__mro__ if kind in RETRY_SECONDS]
    return {"Retry-After": str(seconds[0])} if seconds else {}


def body_of(error: TriptychError, path: str) -> dict[str, Any]:
    """Return an error in the form that clients of a path read: OpenAI's, AUTOMATIC1111's, or Triptych's own."""
    status, text = status_of(error), str(error)
    if path.startswith("/v1/"):
        kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        field = error.field if isinstance(error, BadField) else None
        return {"error": {"message": text, "type": kind, "param": field, "code": error.code}}
    if path.startswith("/sdapi/"):
        return {"error": type(error).__name__, "detail": text, "body": "", "errors": text}
    found: dict[str, Any] = {"code": error.code, "message": error.message, "hint": error.hint}
    if isinstance(error, BadField):
        found["field"] = error.field
    return {"error": found}


def response_of(error: TriptychError, path: str) -> JSONResponse:
    return JSONResponse(body_of(error, path), status_of(error), headers_of(error))


async def tell(request: Request, error: Exception) -> JSONResponse:
    """Answer a request with the error that it met."""
    return response_of(error_of(error), request.url.path)


def error_of(error: Exception) -> TriptychError:
    """Return an error of FastAPI's or Starlette's as one of Triptych's; any other as a fault of Triptych's own."""
    match error:
        case TriptychError():
            return error
        case RequestValidationError():
            return fault_of(error.errors())
        case ValidationError(title="JobRequest"):  # what no API's own fields have refused
            return fault_in_body(error)
        case HTTPException(__cause__=TriptychError() as cause):  # met while the body was read
            return cause
        case HTTPException():
            status, words = HTTPStatus(error.status_code), str(error.detail)
            if status == HTTPStatus.NOT_FOUND:
                words = "There is nothing at this path: /openapi.json lists what there is."
            return Refused(status, words.rstrip(".") + ".", headers=error.headers)
    return TriptychError("That is a fault of Triptych's.", "Its log has more: triptych logs http")


def fault_in_body(error: ValidationError) -> TriptychError:
    """Return the first thing that is wrong with a body that was read by a model of its own."""
    return fault_of([{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors(include_url=False)])


def fault_of(faults: Any) -> TriptychError:
    """Return the first thing that is wrong with a request's fields."""
    fault = faults[0]
    where = [str(part) for part in fault["loc"][1:]]
    if fault["type"] == "json_invalid":
        return BadRequest("The body is no valid JSON.", str(fault.get("ctx", {}).get("error", "")))
    if not where:
        return BadRequest(f"The body can't be read: {fault['msg']}.")
    name = ".".join(where)
    return BadField(name, f"{name}: {fault['msg'].removeprefix('Value error, ')}.", given(fault.get("input")))


def given(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 100 else text[:100] + '…'} was given." if not isinstance(value, dict) else ""

"""The OpenAPI document: what FastAPI finds, with the errors as they are told at each path."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

WORDS = {
    400: "Something in the request can't be right.",
    401: "A key is needed.",
    403: "This key, or this site's page, may not do that.",
    404: "There is no such thing.",
    409: "The id is another job's, or the state does not allow it.",
    413: "The body is too large.",
    421: "This host has no such name.",
    429: "Too many requests or jobs: see Retry-After.",
    500: "The job failed, or a fault of Triptych's.",
    503: "The stack gives no answer now: see Retry-After.",
}


class Fault(BaseModel):
    code: str
    message: str
    hint: str
    field: str | None = None


class Faulty(BaseModel):
    """Why a request was not done."""

    error: Fault


class OpenAIFault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class OpenAIFaulty(BaseModel):
    """Why a request was not done, in OpenAI's form."""

    error: OpenAIFault


class SdFaulty(BaseModel):
    """Why a request was not done, in AUTOMATIC1111's form."""

    error: str
    detail: str
    body: str
    errors: str


FORMS: Mapping[str, type[BaseModel]] = {"/v1/": OpenAIFaulty, "/sdapi/": SdFaulty, "/api/": Faulty}


def described(app: FastAPI) -> dict[str, Any]:
    """Return the document, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        template = "#/components/schemas/{model}"
        for form in FORMS.values():
            schema = form.model_json_schema(ref_template=template)
            schemas |= schema.pop("$defs", {})
            schemas[form.__name__] = schema
        for path, operations in found["paths"].items():
            own = next((form for start, form in FORMS.items() if path.startswith(start)), None)
            for operation in operations.values():
                describe_errors(operation["responses"], own)
        app.openapi_schema = found
    return app.openapi_schema


def describe_errors(responses: dict[str, Any], form: type[BaseModel] | None) -> None:
    """Put the errors of a path's form in the place of FastAPI's own."""
    responses.pop("422", None)
    if form is not None:
        schema = {"$ref": f"#/components/schemas/{form.__name__}"}
        for status, words in WORDS.items():
            responses.setdefault(
                str(status), {"description": words, "content": {"application/json": {"schema": schema}}}
            )

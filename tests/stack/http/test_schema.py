"""The OpenAPI document against the application: what it says is so, whatever is sent."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.stacks import RunningStack

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
SLOW = ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")  # make pictures
CHANGES = ("/load", "/unload")  # which would leave the stack without its model


@pytest.mark.all
@pytest.mark.timeout(900)
def test_what_the_document_says_is_so(served: RunningStack) -> None:
    document = httpx.get(f"{served.http}/openapi.json", trust_env=False).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.base_url = served.http
    tried = 0
    with httpx.Client(trust_env=False, timeout=60):
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path in SLOW or operation.path.endswith((*CHANGES, "/events")):
                continue
            tried += 1

            @settings(
                max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
            )
            def attempt(case: Case) -> None:
                case.call_and_validate(checks=list(CHECKS), timeout=60)

            operation.as_strategy()
            from hypothesis import given

            given(case=operation.as_strategy())(attempt)()
    assert tried > 20
    for job in served.client.jobs(("queued", "text", "denoise", "vae"), 1000):
        served.client.cancel(job.id)

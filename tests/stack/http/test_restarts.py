"""The HTTP process and the orchestrator die under load; keys own jobs; ports that are taken."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.stack.http.conftest import ADDRESS
from tests.stack.test_stack import until
from tests.stacks import RunningStack, running_stack, triptych

JOB = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 40}


@pytest.fixture
def own(state: Path, flux_dev: Path) -> Iterator[RunningStack]:
    with running_stack(state, "--model", str(flux_dev), "--device", "cpu", *ADDRESS) as stack:
        yield stack


def pid_of(stack: RunningStack, name: str) -> int:
    return next(process.pid or 0 for process in stack.client.workers().processes if process.name == name)


def again(stack: RunningStack, body: dict[str, object]) -> httpx.Response:
    """Submit a job as a client that tries until it has an answer."""
    for _ in range(100):
        try:
            answer = httpx.post(f"{stack.http}/api/jobs", json=body, timeout=20, trust_env=False)
        except httpx.TransportError:
            continue
        if answer.status_code != 503:
            return answer
    raise AssertionError("there was never an answer")


@pytest.mark.parametrize("victim", ["http", pytest.param("orchestrator", marks=pytest.mark.all)])
def test_what_dies_under_load_loses_and_doubles_nothing(victim: str, own: RunningStack) -> None:
    accepted: list[int] = []

    def submit(number: int) -> None:
        accepted.append(again(own, {**JOB, "seed": number, "id": f"job-{number}"}).status_code)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(12)]
    old = pid_of(own, victim)
    for number, thread in enumerate(threads):
        thread.start()
        if number == 5:
            os.kill(old, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert accepted == [201] * 12
    assert len(own.client.jobs(limit=100)) == 12
    for number in range(12):
        assert own.client.wait(f"job-{number}", 120).state == "done"
    assert len(own.client.jobs(limit=100)) == 12
    until(own, lambda w: any(p.name == victim and p.pid not in (None, old) for p in w.processes))
    assert httpx.get(f"{own.http}/healthz", trust_env=False).status_code == 200


def test_keys_own_the_jobs_that_come_with_them(state: Path, flux_dev: Path) -> None:
    arguments = ("--model", str(flux_dev), "--device", "cpu", *ADDRESS, "--http-keys", "required")
    with running_stack(state, *arguments) as stack:
        tokens = {name: triptych("keys", "new", name, "--http", folder=state).stdout.strip() for name in ("ann", "bob")}
        headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}

        def ask(name: str, method: str, path: str, **options: object) -> httpx.Response:
            address = f"{stack.http}{path}"
            return httpx.request(method, address, headers=headers[name], timeout=60, trust_env=False, **options)

        assert httpx.get(f"{stack.http}/api/jobs", trust_env=False).status_code == 401
        for name in ("ann", "bob"):  # who may call their jobs as they like
            made = ask(name, "POST", "/api/jobs", json={**JOB, "id": "mine", "prompt": f"{name}'s"})
            assert made.status_code == 201, made.text
        for name in ("ann", "bob"):
            (job,) = ask(name, "GET", "/api/jobs").json()
            assert (job["id"], job["recipe"]["prompt"]) == ("mine", f"{name}'s")
        only = ask("ann", "POST", "/api/jobs", json={**JOB, "id": "only-anns"}).json()["id"]
        assert ask("bob", "GET", f"/api/jobs/{only}").status_code == 404
        assert ask("bob", "POST", f"/api/jobs/{only}/cancel").status_code == 404
        assert ask("bob", "POST", "/api/models/x/unload").status_code == 403  # which is the stack's user's
        assert ask("bob", "GET", "/api/workers").json()["processes"] == []
        made = ask(
            "ann",
            "POST",
            "/v1/images/generations",
            json={"prompt": "a", "size": "32x32", "steps": 1, "response_format": "url"},
        )
        link = made.json()["data"][0]["url"]
        assert httpx.get(link, trust_env=False).status_code == 200
        assert len(stack.client.jobs()) == 4  # the stack's user sees them all
        assert triptych("keys", "revoke", "ann", folder=state).returncode == 0
        assert ask("ann", "GET", "/api/jobs").status_code == 401
        assert httpx.get(link, trust_env=False).status_code == 403
        assert ask("bob", "GET", "/api/jobs").status_code == 200


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(state: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = triptych("up", "--http", f"127.0.0.1:{port}", folder=state)
    assert (done.returncode, f"127.0.0.1:{port}" in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    for wrong in ("7870", "localhost", "http://localhost:1", "127.0.0.1:99999"):
        refused = triptych("up", "--http", wrong, folder=state)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr

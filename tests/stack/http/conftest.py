"""A stack that serves HTTP, shared by tests that leave it as they found it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.stacks import RunningStack, running_stack

ADDRESS = ("--http", "127.0.0.1:0", "--http-rate", "1000")


@pytest.fixture(scope="session")
def served(flux_dev: Path) -> Iterator[RunningStack]:
    with (
        tempfile.TemporaryDirectory(prefix="tt-") as folder,
        running_stack(Path(folder), "--model", str(flux_dev), "--device", "cpu", *ADDRESS) as running,
    ):
        yield running


@pytest.fixture
def web(served: RunningStack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.http, timeout=60, trust_env=False) as client:
        yield client

"""Other hosts for tests, which are skipped where there can be none."""

import contextlib
from collections.abc import Iterator

import pytest

from scripts.faults.networks import CantBe, Network, other_hosts


@contextlib.contextmanager
def hosts_or_skip(count: int) -> Iterator[Network]:
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(other_hosts(count))
        except CantBe as error:
            pytest.skip(str(error))
        yield network

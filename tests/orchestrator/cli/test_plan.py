"""Hosts that somebody thinks of, for a plan."""

import pytest

from orchestrator.cli.plan import parse_host
from protocol.errors import BadRequest


def test_a_host_is_a_name_and_its_gpus() -> None:
    assert parse_host("box=RTX 4090:24GB,16GB") == ("box", "RTX 4090:24GB,16GB")


@pytest.mark.parametrize("text", ["box", "=16GB", "box=", "a b=16GB"])
def test_what_is_no_host_is_named(text: str) -> None:
    with pytest.raises(BadRequest, match="--hosts"):
        parse_host(text)

"""Questions to the describer, and the blame for its end."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.dispatch.catalogue import CatalogueEntry
from orchestrator.dispatch.describer_link import DescriberLink
from orchestrator.dispatch.outbox import Outbox
from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.messages.describer import DescriberHello
from tests.fakes import MODEL


def describer_link() -> DescriberLink:
    entry = CatalogueEntry(MODEL, "float32", ())
    catalogue: Any = SimpleNamespace(
        known=entry,
        learn=lambda _: None,
        uncounted=lambda requests: [r.prompt for r in requests],
        default=lambda: entry,
    )
    return DescriberLink(Outbox(), catalogue, expected=True)


def test_only_the_prompt_that_a_describer_had_in_hand_is_blamed_for_its_end() -> None:
    link, hello = describer_link(), DescriberHello(pid=1, dtype="float32", speedups=(), model=MODEL)
    link.hello(b"1", hello)
    bad, good = [JobRequest(prompt="bad")], [JobRequest(prompt="good")]
    assert not link.ready_for(bad)
    assert not link.ready_for(good)
    link.hello(b"2", hello)
    link.hello(b"3", hello)
    with pytest.raises(BadRequest, match="tokenizer fails at this prompt"):
        link.ready_for(bad)
    assert not link.ready_for(good)  # it is being counted

"""Questions to the describer, and the blame for its end."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.dispatch.describer_link import DescriberLink
from orchestrator.dispatch.outbox import Outbox
from protocol.errors import BadRequest
from protocol.job import JobRequest
from protocol.messages.describer import DescriberHello
from tests.fakes import MODEL


def describer_link() -> DescriberLink:
    admission: Any = SimpleNamespace(
        model=MODEL, learn_model=lambda _: None, uncounted=lambda requests: [r.prompt for r in requests]
    )
    return DescriberLink(Outbox(), admission, expected=True)


def test_only_the_prompt_that_a_describer_had_in_hand_is_blamed_for_its_end() -> None:
    desk, hello = describer_link(), DescriberHello(pid=1, dtype="float32", speedups=(), model=MODEL)
    desk.hello(b"1", hello)
    bad, good = [JobRequest(prompt="bad")], [JobRequest(prompt="good")]
    assert not desk.ready_for(bad)
    assert not desk.ready_for(good)
    desk.hello(b"2", hello)
    desk.hello(b"3", hello)
    with pytest.raises(BadRequest, match="tokenizer fails at this prompt"):
        desk.ready_for(bad)
    assert not desk.ready_for(good)  # it is being counted

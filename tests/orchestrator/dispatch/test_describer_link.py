"""Questions to the describer, and the blame for its end."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.dispatch.catalogue import Routes, Tokens
from orchestrator.dispatch.describer_link import MOST_ASKED, MOST_OF_A_KEY, DescriberLink
from orchestrator.dispatch.lora_book import LoraBook
from orchestrator.dispatch.outbox import Outbox
from orchestrator.principal import KeyHolder
from protocol.errors import BadRequest, QueueFull
from protocol.job import JobRequest
from protocol.messages.describer import CountTokens, DescriberHello, LookAt, Looked, TokenCounts
from protocol.route import WHOLE, Route, Template
from tests.fakes import MODEL
from tests.protocol.test_recipe import recipe


def describer_link() -> DescriberLink:
    entry = SimpleNamespace(
        name="",
        routes=Routes(),
        loras=LoraBook(),
        tokens=Tokens(),
        uncounted=lambda requests: [r.prompt for r in requests],
    )
    catalogue: Any = SimpleNamespace(entries=[entry], learn=lambda _: None, entry=lambda _: entry)
    return DescriberLink(Outbox(), catalogue, expected=True)


def test_only_the_prompt_that_a_describer_had_in_hand_is_blamed_for_its_end() -> None:
    link, hello = describer_link(), DescriberHello(pid=1, dtype="float32", speedups=(), model=MODEL)
    link.hello(b"1", hello)
    bad, good = [JobRequest(prompt="bad")], [JobRequest(prompt="good")]
    assert not link.ready_for(bad)
    assert not link.ready_for(good)
    link.hello(b"1b", hello)  # the same process again has not ended
    link.hello(b"2", hello.model_copy(update={"pid": 2}))
    link.hello(b"3", hello.model_copy(update={"pid": 3}))
    with pytest.raises(BadRequest, match="tokenizer fails at this prompt"):
        link.ready_for(bad)
    assert not link.ready_for(good)  # it is being counted


def test_a_template_is_looked_at_once_and_one_that_ends_describers_has_no_route() -> None:
    link, hello = describer_link(), DescriberHello(pid=1, dtype="float32", speedups=(), model=MODEL)
    routes = link.catalogue.entry("").routes
    one, other = (Template.of(recipe(steps=steps), ()) for steps in (1, 2))
    link.hello(b"1", hello)
    link.look_at([one, one, other])
    asked = [letter.message for letter in link.outbox.drain()]
    assert [(m.request, m.recipe.steps) for m in asked if isinstance(m, LookAt)] == [(1, 1), (2, 2)]
    link.looked(Looked(request=2, route=Route(encoded="x", calls=1, following="denoise")))
    known = routes.get(other)
    assert known is not None
    assert (known.route.encoded, known.following) == ("x", "denoise")
    link.hello(b"1b", hello)  # the same process again has not ended
    link.hello(b"2", hello.model_copy(update={"pid": 2}))
    link.hello(b"3", hello.model_copy(update={"pid": 3}))
    assert routes.get(one) is not None
    link.looked(Looked(request=9, route=Route(refusal="no")))  # which nobody has asked


def test_a_route_is_trusted_as_far_as_workers_bear_it_out() -> None:
    routes, template = Routes(), Template.of(recipe(), ())
    routes.learn(template, Route(encoded="x", calls=1, following="denoise"))
    (known,) = (routes.get(template),)
    assert known is not None
    assert not known.text_key(recipe()).startswith(WHOLE)
    assert routes.seen(template, "denoise", 1)
    assert not routes.seen(template, "vae", 2)
    known = routes.get(template)
    assert known is not None
    assert known.text_key(recipe()).startswith(WHOLE)
    assert known.following == "vae"
    assert not routes.seen(None, "denoise", 1)


def test_one_keys_many_questions_leave_the_others_their_turns() -> None:
    link, mallory = describer_link(), KeyHolder("mallory")
    link.hello(b"1", DescriberHello(pid=1, dtype="float32", speedups=(), model=MODEL))
    for number in range(MOST_OF_A_KEY):
        assert not link.ready_for([JobRequest(prompt=f"x {number}")], mallory)
    with pytest.raises(QueueFull):
        link.ready_for([JobRequest(prompt="one more")], mallory)
    assert not link.ready_for([JobRequest(prompt="a cat")])
    asked = [letter.message for letter in link.outbox.drain()]
    assert len(asked) == MOST_ASKED
    link.counted(TokenCounts(request=1, counts=(3,)))
    (following,) = [letter.message for letter in link.outbox.drain()]
    assert isinstance(following, CountTokens)
    assert following.texts == ("a cat",)

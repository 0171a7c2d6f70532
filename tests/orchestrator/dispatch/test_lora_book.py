"""The book of LoRAs: answers hold for some seconds."""

import pytest

from orchestrator.dispatch.lora_book import FRESH_SECONDS, LoraBook
from protocol.errors import BadRequest, NotFound
from protocol.lora import Lora, LoraRequest
from protocol.messages.describer import FoundLora

ASKED = LoraRequest(name="pastel", weight=0.5)
FOUND = FoundLora(request=1, lora=Lora(name="pastel", digest="a" * 64, weight=1.0))


def test_an_answer_is_for_all_weights_and_for_some_seconds() -> None:
    now = [100.0]
    book = LoraBook(lambda: now[0])
    assert not book.knows(ASKED)
    book.learn(ASKED.model_copy(update={"weight": 1.0}), FOUND)
    assert book.knows(ASKED)
    assert book.of(ASKED) == Lora(name="pastel", digest="a" * 64, weight=0.5)
    now[0] += FRESH_SECONDS
    assert not book.knows(ASKED)


def test_refusals_are_the_describers_own() -> None:
    book = LoraBook()
    book.learn(ASKED, FoundLora(request=1, reason="There is no LoRA 'pastel' in this stack.", hint="See."))
    with pytest.raises(NotFound, match="no LoRA 'pastel'"):
        book.of(ASKED)
    book.learn(ASKED, FoundLora(request=1, reason="LoRA 'pastel' is not for this model: it is for SDXL."))
    with pytest.raises(BadRequest, match="for SDXL"):
        book.of(ASKED)
    with pytest.raises(BadRequest, match="takes no LoRAs"):
        book.of(LoraRequest(name="other"))


def test_a_list_is_fresh_for_some_seconds() -> None:
    now = [100.0]
    book = LoraBook(lambda: now[0])
    assert book.listed is None
    book.list(())
    assert book.listed == ()
    now[0] += FRESH_SECONDS
    assert book.listed is None

"""The book of LoRAs: answers hold for some seconds."""

import pytest

from orchestrator.dispatch.lora_book import FRESH_SECONDS, LoraBook, question_of
from protocol.errors import BadRequest, NotFound
from protocol.lora import Lora, LoraRequest
from protocol.messages.describer import FoundLora

ASKED = LoraRequest(name="pastel", weight=0.5)
FOUND = FoundLora(request=1, lora=Lora(name="pastel", digest="a" * 64, weight=1.0))


def test_an_answer_is_for_all_weights_and_for_some_seconds() -> None:
    now = [100.0]
    book = LoraBook(lambda: now[0])
    assert not book.knows(question_of(ASKED))
    question = question_of(ASKED)
    book.learn(question, FOUND)
    assert book.knows(question)
    assert book.of(ASKED) == Lora(name="pastel", digest="a" * 64, weight=0.5)
    now[0] += 2 * FRESH_SECONDS
    assert not book.knows(question)
    assert book.knows(question, since=99.0)  # for who has waited for it since before
    assert not book.knows(question, since=101.0)
    book.learn(question, FOUND, for_good=True)
    now[0] += 1000.0
    assert book.knows(question)


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

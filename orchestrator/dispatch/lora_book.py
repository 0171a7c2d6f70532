"""The describer's answers about LoRAs: each holds for some seconds, and for who has waited for it."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from protocol.errors import BadRequest, NotFound, TriptychError
from protocol.lora import Lora, LoraInfo, LoraRequest
from protocol.messages.describer import FoundLora

FRESH_SECONDS = 5.0
MOST_KNOWN = 1000
Clock = Callable[[], float]


def question_of(asked: LoraRequest) -> LoraRequest:
    """Return what is asked of the describer: the same for all weights."""
    return asked if asked.weight == 1.0 else asked.model_copy(update={"weight": 1.0})


class LoraBook:
    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._answers: OrderedDict[LoraRequest, tuple[float, FoundLora]] = OrderedDict()
        self._listed: tuple[float, tuple[LoraInfo, ...]] | None = None

    def knows(self, question: LoraRequest, since: float = math.inf) -> bool:
        """Return whether there is a fresh answer, or one that came `since` then."""
        found = self._answers.get(question)
        return found is not None and found[0] >= min(since, self._clock() - FRESH_SECONDS)

    def learn(self, asked: LoraRequest, answer: FoundLora, for_good: bool = False) -> None:
        self._answers[question_of(asked)] = math.inf if for_good else self._clock(), answer
        self._answers.move_to_end(question_of(asked))
        while len(self._answers) > MOST_KNOWN:
            self._answers.popitem(last=False)

    def answer(self, asked: LoraRequest) -> FoundLora:
        """Return the last answer; NotFound or BadRequest with the describer's reason where there is no LoRA."""
        found = self._answers.get(question_of(asked))
        if found is None:
            raise BadRequest("This stack takes no LoRAs.", "Leave --lora out.")
        if found[1].lora is None:
            raise refusal(found[1])
        return found[1]

    def of(self, asked: LoraRequest) -> Lora:
        """Return the LoRA that a request names, with its weight; what `answer` raises."""
        lora = self.answer(asked).lora
        assert lora is not None
        return lora.model_copy(update={"name": asked.name, "weight": asked.weight})

    def list(self, loras: tuple[LoraInfo, ...]) -> None:
        """Take in all that have a name."""
        self._listed = self._clock(), loras

    @property
    def listed(self) -> tuple[LoraInfo, ...] | None:
        """All that have a name, if that was asked lately."""
        if self._listed is None or self._clock() - self._listed[0] >= FRESH_SECONDS:
            return None
        return self._listed[1]


def refusal(answer: FoundLora) -> TriptychError:
    kind = NotFound if answer.reason.startswith(("There is no LoRA", "The file of LoRA")) else BadRequest
    return kind(answer.reason or "This LoRA can't be used.", answer.hint)

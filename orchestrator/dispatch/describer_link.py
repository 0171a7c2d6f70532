"""The orchestrator's side of the describers: submissions wait for them to know the models and to count their tokens."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.dispatch.catalogue import Catalogue, CatalogueEntry
from orchestrator.dispatch.lora_book import question_of
from orchestrator.dispatch.outbox import Outbox
from orchestrator.principal import LOCAL_USER, KeyHolder, Principal
from protocol.errors import BadRequest, QueueFull
from protocol.job import JobRequest
from protocol.lora import MAX_DIFFERENT, LoraInfo, LoraRequest
from protocol.messages.common import Message
from protocol.messages.describer import (
    CountTokens,
    DescriberHello,
    FindLora,
    FoundLora,
    KnownLoras,
    ListLoras,
    LookAt,
    Looked,
    TokenCounts,
)
from protocol.route import Route, Template

log = logging.getLogger(__name__)

MOST_WAITING = 1000  # questions at once
MOST_OF_A_KEY = 100  # of them, of one key's
MOST_ASKED = 2  # of them that the describer has; the others wait here, and those of each principal come in turns
MOST_ENDED = 2  # times that texts may end the describer before they are refused
SILENCE_SECONDS = 20.0  # many long prompts take it a while


Asked = tuple[str, ...] | Template | LoraRequest | None


@dataclass(slots=True)
class Question:
    """A question to the describer: texts to count, a template to look at, a LoRA to find, or all to list (None)."""

    of: "Asked"
    principal: Principal = LOCAL_USER  # who asked first
    asked: bool = False
    ended: int = 0  # describers that were at it when they ended

    def message(self, number: int) -> Message:
        match self.of:
            case Template(recipe=recipe, shapes=shapes):
                return LookAt(request=number, recipe=recipe, shapes=shapes)
            case LoraRequest() as lora:
                return FindLora(request=number, lora=lora)
            case None:
                return ListLoras(request=number)
            case texts:
                return CountTokens(request=number, texts=texts)


@dataclass(slots=True)
class DescriberLink:
    """The link to the describer of a model, known by its `name`.

    `expected`: the stack has it, and takes no job that it has not looked at.
    """

    outbox: Outbox
    catalogue: Catalogue
    expected: bool
    name: str = ""
    pid: int = 0  # of the describer that is here; 0: none is
    identity: bytes = b""  # of its socket; empty: none is here
    _heard: float = 0.0  # monotonic seconds
    _last_pid: int = 0  # of the describer that was here last
    _number: int = 0
    _turn: int = 0
    _turns: dict[Principal, int] = field(default_factory=dict)  # of each principal's last question
    _open: dict[int, Question] = field(default_factory=dict)  # by its number
    _failed: dict[tuple[str, ...], str] = field(default_factory=dict)  # texts that can't be counted, and why

    def hello(self, identity: bytes, hello: DescriberHello) -> None:
        """Take in a describer that has found the model to be whole; what its predecessor left open is asked again."""
        new = hello.pid != self._last_pid
        self._last_pid = hello.pid
        self.identity, self.pid, self._heard = identity, hello.pid, time.monotonic()
        self.catalogue.learn(hello)
        if new and (oldest := next(iter(self._open.values()), None)) and oldest.asked:  # answers come in order
            oldest.ended += 1
        for number, question in list(self._open.items()):
            question.asked = False
            if question.ended >= MOST_ENDED:
                del self._open[number]
                self._give_up(number, question.of)
        self._ask_next()

    def _give_up(self, number: int, of: Asked) -> None:
        """Answer a question that ends the process that is asked."""
        match of:
            case Template():
                self._entry.routes.learn(of, Route())
            case LoraRequest(name=name):
                reason = f"LoRA {name!r}: looking at its file ended the process that does so"
                self._entry.loras.learn(of, FoundLora(request=number, reason=reason), for_good=True)
            case None:
                self._entry.loras.list(())
            case texts:
                self._failed[texts] = "counting its tokens ended the process that does so"

    @property
    def _known(self) -> bool:
        return any(entry.name == self.name for entry in self.catalogue.entries)

    @property
    def _entry(self) -> CatalogueEntry:
        return self.catalogue.entry(self.name)

    def is_here(self, identity: bytes) -> bool:
        """Return whether a message is the present describer's; it is a sign of life."""
        if identity != self.identity:
            return False
        self._heard = time.monotonic()
        return True

    def gone(self, pid: int) -> None:
        """Forget the describer if the process that has ended is its own."""
        if pid == self.pid:
            self.identity, self.pid = b"", 0

    def silent(self) -> int:
        """Return the describer's process number if it has been silent for too long; it counts as gone then. Else 0."""
        pid = self.pid
        if pid and time.monotonic() - self._heard > SILENCE_SECONDS:
            self.gone(pid)
            return pid
        return 0

    def ready_for(
        self, requests: Sequence[JobRequest], principal: Principal = LOCAL_USER, since: float = math.inf
    ) -> bool:
        """Return whether requests, which have waited `since` then, can be judged now; what is missing is asked for.

        BadRequest, QueueFull.
        """
        if not self._known:
            return False
        if not self.expected:
            return True
        wanted = dict.fromkeys(question_of(lora) for request in requests for lora in request.loras)
        if len(wanted) > MAX_DIFFERENT:
            raise BadRequest(f"{len(wanted)} different LoRAs are named.", f"Name {MAX_DIFFERENT} at most at once.")
        missing = [lora for lora in wanted if not self._entry.loras.knows(lora, since)]
        for lora in missing:
            self._ask_once(lora, principal)
        if missing or not (texts := tuple(self._entry.uncounted(requests))):
            return not missing
        if reason := self._failed.pop(texts, ""):
            raise BadRequest(f"The model's tokenizer fails at this prompt: {reason}.", "Change the prompt.")
        self._ask_once(texts, principal)
        return False

    def list_loras(self, principal: Principal) -> bool:
        """Return whether the list of LoRAs is fresh; else it is asked for."""
        if not self.expected:
            return True
        if not self._known:
            return False
        if self._entry.loras.listed is not None:
            return True
        self._ask_once(None, principal)
        return False

    @property
    def loras_listed(self) -> tuple[LoraInfo, ...]:
        """The LoRAs as they were last listed."""
        return (self._entry.loras.listed or ()) if self._known else ()

    def look_at(self, templates: Sequence[Template], principal: Principal = LOCAL_USER) -> None:
        """Have it found out what jobs of these begin with."""
        for template in templates:
            if not self._too_many(principal):
                self._ask_once(template, principal)
            else:  # a sweep of more than there is time for
                self._entry.routes.learn(template, Route())

    def _too_many(self, principal: Principal) -> bool:
        own = sum(question.principal == principal for question in self._open.values())
        return len(self._open) >= MOST_WAITING or (isinstance(principal, KeyHolder) and own >= MOST_OF_A_KEY)

    def _ask_once(self, of: Asked, principal: Principal) -> None:
        if any(question.of == of for question in self._open.values()):
            return
        if self._too_many(principal):
            raise QueueFull("Too many submissions wait for the model to be asked about them.", "Try again later.")
        self._number += 1
        question = Question(of, principal)
        question.message(self._number)  # which must be possible
        self._open[self._number] = question
        self._ask_next()

    def _ask_next(self) -> None:
        """Ask what comes next, of the principal whose last question was asked longest ago."""
        asked = sum(question.asked for question in self._open.values())
        while self.identity and asked < MOST_ASKED:
            waiting = [(number, question) for number, question in self._open.items() if not question.asked]
            if not waiting:
                return
            number, question = min(waiting, key=lambda one: self._turns.get(one[1].principal, 0))
            self._turn += 1
            self._turns[question.principal] = self._turn
            question.asked, asked = True, asked + 1
            self.outbox.to_worker(self.identity, question.message(number))

    def _answered(self, number: int) -> Question | None:
        """Return the question of an answer, None if it is no longer open, and ask the next."""
        question = self._open.pop(number, None)
        self._ask_next()
        return question

    def counted(self, counts: TokenCounts) -> None:
        question = self._answered(counts.request)
        if question is None or not isinstance(question.of, tuple):
            return
        if counts.reason or len(counts.counts) != len(question.of):
            self._failed[question.of] = counts.reason or "it counted others"
        else:
            self._entry.tokens.learn(question.of, counts.counts)

    def looked(self, looked: Looked) -> None:
        question = self._answered(looked.request)
        if question is not None and isinstance(question.of, Template):
            self._entry.routes.learn(question.of, looked.route)

    def found_lora(self, found: FoundLora) -> None:
        question = self._answered(found.request)
        if question is not None and isinstance(question.of, LoraRequest):
            self._entry.loras.learn(question.of, found)

    def listed_loras(self, known: KnownLoras) -> None:
        question = self._answered(known.request)
        if question is not None and question.of is None:
            self._entry.loras.list(known.loras)


class DescriberLinks:
    """The links to the describers of all models of the stack."""

    def __init__(self, outbox: Outbox, catalogue: Catalogue, expected: bool) -> None:
        self._outbox, self._catalogue, self._expected = outbox, catalogue, expected
        self._links: dict[str, DescriberLink] = {}
        for name in catalogue.models:
            self.add(name)

    def __iter__(self) -> Iterator[DescriberLink]:
        return iter(self._links.values())

    def add(self, name: str) -> None:
        self._links.setdefault(name, DescriberLink(self._outbox, self._catalogue, self._expected, name))

    def remove(self, name: str) -> None:
        self._links.pop(name, None)

    def of(self, model: str | None) -> DescriberLink:
        """Return the link to the describer of the model that a request names; NotFound."""
        return self._links[self._catalogue.name(model)]

    def hello(self, identity: bytes, hello: DescriberHello) -> None:
        """Take in a describer of a model of this stack."""
        if hello.name in self._links:
            self._links[hello.name].hello(identity, hello)

    def here(self, identity: bytes) -> DescriberLink | None:
        """Return the link to the describer whose message this is; it is a sign of life."""
        return next((link for link in self if link.is_here(identity)), None)

    def ready_for(self, requests: Sequence[JobRequest], principal: Principal, since: float = math.inf) -> bool:
        """Return whether requests can be judged now; what is missing is asked of each one's describer."""
        by_model: dict[str, list[JobRequest]] = {}
        for request in requests:
            by_model.setdefault(self._catalogue.name_for(request), []).append(request)
        ready = [self._links[name].ready_for(of_it, principal, since) for name, of_it in by_model.items()]
        return all(ready)

    def look_at(self, templates: Mapping[Template, str], principal: Principal) -> None:
        """Have it found out what jobs of these begin with, each of a model by its name."""
        for template, name in templates.items():
            self._links[name].look_at([template], principal)

    def gone(self, pid: int) -> None:
        for link in self:
            link.gone(pid)

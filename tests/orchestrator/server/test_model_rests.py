"""Which models have workers, as far as the orchestrator decides it."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.dispatch.catalogue import CatalogueEntry
from orchestrator.server.model_rests import ASK_AGAIN_SECONDS, ModelRests
from orchestrator.settings import ModelSettings
from protocol.errors import Conflict
from protocol.messages.supervisor import RestingModel
from tests.fakes import MODEL

ENTRY = CatalogueEntry("m", MODEL, "float32", ())


class Told:
    """ModelRests with a clock, jobs and workers that a test sets; `said` is what the supervisor was told."""

    def __init__(self, rest_after: float | None = None) -> None:
        self.now, self.jobs, self.failed = 100.0, Counter[Any](), list[str]()
        self.said: list[tuple[str, bool]] = []
        self.fleet = [SimpleNamespace(model=ENTRY.key, state="idle")]
        catalogue = SimpleNamespace(
            entries=[ENTRY], models={"m": ModelSettings(name="m", rest_after=rest_after)}, name=lambda name: name,
            entry=lambda name: ENTRY,
        )  # fmt: skip
        engine: Any = SimpleNamespace(
            catalogue=catalogue, job_queue=SimpleNamespace(by_model=self.jobs), fleet=self.fleet,
            fail_waiting=lambda key, reason: self.failed.append(reason),
        )  # fmt: skip
        link: Any = SimpleNamespace(wake=lambda name, rest=False: self.said.append((name, rest)))
        self.rests = ModelRests(engine, link, lambda: self.now)

    def look(self, seconds: float = 0.0) -> list[tuple[str, bool]]:
        self.now += seconds
        self.said.clear()
        self.rests.see_to_it()
        return [*self.said]


def test_a_model_with_jobs_is_woken_again_and_again_until_it_is_there() -> None:
    told = Told()
    told.rests.told([RestingModel(name="m")])
    assert told.look() == []
    told.jobs[ENTRY.key] = 1
    assert told.look() == [("m", False)]
    assert told.look() == []
    assert told.look(ASK_AGAIN_SECONDS) == [("m", False)]
    told.rests.told([])
    assert told.look(ASK_AGAIN_SECONDS) == []


def test_a_model_whose_workers_have_come_does_not_rest_whatever_the_supervisor_told_before() -> None:
    told = Told()
    told.rests.told([RestingModel(name="m")])
    assert not told.rests.rests(ENTRY)
    told.fleet.clear()
    assert told.rests.rests(ENTRY)


def test_a_model_whose_memory_another_needs_rests_unless_it_has_jobs_by_then() -> None:
    told = Told()
    told.jobs[ENTRY.key] = 1
    told.rests.let_rest([ENTRY.key])
    assert told.said == []
    told.jobs[ENTRY.key] = 0
    asked = [ENTRY.key]
    told.rests.let_rest(asked)
    assert (told.said, asked) == ([("m", True)], [])
    told.rests.told([RestingModel(name="m")])
    told.rests.let_rest([ENTRY.key])
    assert told.said == [("m", True)]


def test_a_model_rests_after_a_while_without_jobs_in_which_its_workers_were_there() -> None:
    told = Told(rest_after=10.0)
    told.fleet[0].state = "loading"
    assert [told.look(9.0) for _ in range(3)] == [[], [], []]
    told.fleet[0].state = "idle"
    assert told.look(9.0) == []
    assert told.look(1.0) == [("m", True)]
    told.jobs[ENTRY.key] = 1
    assert told.look(20.0) == []
    told.jobs[ENTRY.key] = 0
    assert (told.look(9.0), told.look(1.0)) == ([], [("m", True)])


def test_jobs_of_a_model_that_cannot_be_started_fail_once_and_not_for_an_old_reason() -> None:
    told = Told()
    failed = RestingModel(name="m", reason="no file")
    told.rests.told([failed])  # of before this orchestrator
    assert told.failed == []
    told.rests.told([])
    told.rests.told([failed])
    told.rests.told([failed])
    assert told.failed == ["m can't be run: no file"]
    assert told.rests.reason("m") == "no file"


def test_a_model_with_jobs_is_not_unloaded_and_loading_is_always_told() -> None:
    told = Told()
    told.jobs[ENTRY.key] = 2
    with pytest.raises(Conflict, match="2 unfinished jobs"):
        told.rests.unload("m")
    told.jobs[ENTRY.key] = 0
    told.rests.unload("m")
    told.rests.load("m")
    assert told.said == [("m", True), ("m", False)]

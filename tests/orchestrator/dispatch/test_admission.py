"""What is let in, for whom, and by which model it is judged."""

import json
from pathlib import Path

import pytest

from orchestrator.dispatch.admission import is_of
from orchestrator.dispatch.catalogue import Catalogue
from orchestrator.dispatch.outbox import Outbox
from orchestrator.dispatch.quotas import Quotas
from orchestrator.job import ModelKey
from orchestrator.principal import LOCAL_USER, KeyHolder, from_column, to_column
from orchestrator.settings import ModelSettings, OrchestratorSettings
from orchestrator.storage.job_store import Store
from orchestrator.token_bucket import TokenBucket
from protocol.errors import NotFound, QueueFull
from protocol.job import JobRequest
from protocol.messages.client import Done, JobEvent
from protocol.messages.describer import DescriberHello
from protocol.messages.worker import Task
from tests.fakes import MODEL
from tests.orchestrator.storage.test_job_store import job
from tests.protocol.test_recipe import recipe

ALICE, BOB = KeyHolder("alice"), KeyHolder("bob")
REQUEST = JobRequest(prompt="a")


def quotas(folder: Path, **settings: object) -> Quotas:
    return Quotas(OrchestratorSettings(**settings), Store(None, folder), folder)


def test_the_queue_holds_so_many_jobs_those_before_in_a_submission_included(tmp_path: Path) -> None:
    mine = quotas(tmp_path, queue_limit=3)
    mine.add(job(1))
    mine.check([REQUEST] * 2, LOCAL_USER)
    with pytest.raises(QueueFull, match="holds 1 of at most 3"):
        mine.check([REQUEST] * 3, LOCAL_USER)
    with pytest.raises(QueueFull):
        mine.check([REQUEST], LOCAL_USER, earlier=2)
    mine.add(job(1), -1)
    mine.check([REQUEST] * 3, LOCAL_USER)


def test_a_key_has_a_share_of_the_queue_and_the_local_user_has_all_of_it(tmp_path: Path) -> None:
    mine = quotas(tmp_path, client_jobs=2, client_rate=1.0)
    with pytest.raises(QueueFull, match="'alice' has 0 of at most 2"):
        mine.check([REQUEST] * 3, ALICE)
    mine.check([REQUEST] * 3, LOCAL_USER)
    mine.spend(60, ALICE)
    with pytest.raises(QueueFull, match="come too soon"):
        mine.check([REQUEST] * 1, ALICE)
    mine.check([REQUEST] * 1, BOB)


def test_a_full_disk_refuses_before_anything_is_accepted(tmp_path: Path) -> None:
    def with_floor(size: int) -> Quotas:
        settings = OrchestratorSettings(disk_floor=size)
        return Quotas(settings, Store(None, tmp_path), tmp_path, lambda path: 10)

    with pytest.raises(QueueFull, match="has 10 B left"):
        with_floor(11).check([REQUEST], LOCAL_USER)
    with_floor(10).check([REQUEST], LOCAL_USER)


def test_a_request_is_known_again_by_a_release_that_has_more_fields() -> None:
    request = JobRequest(prompt="a", seed=3)
    fields = json.loads(request.model_dump_json())
    assert fields.pop("controlnet", 0) is None
    assert is_of(json.dumps(fields), request)
    assert not is_of(json.dumps(fields | {"seed": 4}), request)
    assert not is_of(json.dumps(fields | {"unknown": 1}), request)


def test_a_bucket_fills_at_its_rate_and_no_further() -> None:
    now = 0.0
    bucket = TokenBucket(rate=2.0, burst=4.0, clock=lambda: now)
    assert bucket.take(4)
    assert not bucket.take()
    now = 0.5
    assert bucket.take()
    assert not bucket.take()
    now = 100.0
    assert bucket.left() == 4.0
    assert not bucket.take(5)
    assert bucket.take(4)


def test_requests_are_judged_by_the_model_that_was_told_of_last(tmp_path: Path) -> None:
    catalogue = Catalogue(Store(None, tmp_path))
    assert catalogue.known is None
    with pytest.raises(NotFound):
        catalogue.default()
    other = MODEL.model_copy(update={"model": "other"})
    for model, dtype in ((MODEL, "float32"), (other, "float32"), (MODEL, "float32"), (MODEL, "bfloat16")):
        catalogue.learn(DescriberHello(pid=1, dtype=dtype, model=model))
    assert (catalogue.default().description, catalogue.default().dtype) == (MODEL, "bfloat16")


def test_a_request_names_a_model_by_its_name_or_as_the_stack_was_told_of_it(tmp_path: Path) -> None:
    models = (ModelSettings(name="a", model=MODEL.model), ModelSettings(name="b", model="owner/b"))
    catalogue = Catalogue(Store(None, tmp_path), models)
    found = MODEL.model_copy(update={"model": "/cache/b", "revision": "2"})
    for name, model in (("a", MODEL), ("b", found)):
        catalogue.learn(DescriberHello(name=name, pid=1, dtype="float32", model=model))
    for named, name in ((None, "a"), ("", "a"), ("a", "a"), (MODEL.model, "a"), ("b", "b"), ("owner/b", "b")):
        assert catalogue.entry(named).name == name
    assert catalogue.entry("/cache/b").name == "b"
    with pytest.raises(NotFound, match="no model 'c'") as refused:
        catalogue.entry("c")
    assert "a, b" in refused.value.hint
    key = catalogue.entry("b").key
    assert catalogue.of(key) == catalogue.entry("b")
    assert catalogue.settings(key).model == "owner/b"
    assert catalogue.of(ModelKey.of("3", "float32", ())) is None


def test_what_jobs_choose_goes_with_its_model(tmp_path: Path) -> None:
    models = (
        ModelSettings(name="a", model="owner/a"), ModelSettings(name="b", model="owner/b"),
        ModelSettings(name="b+canny", model="owner/b", chosen="controlnet"),
        ModelSettings(name="b+xl", model="owner/b", chosen="refiner"),
    )  # fmt: skip
    catalogue = Catalogue(Store(None, tmp_path), models)
    for chosen, name in (({"controlnet": "canny"}, "b+canny"), ({"refiner": "xl"}, "b+xl"), ({}, "b")):
        assert catalogue.name_for(JobRequest(prompt="p", model="owner/b", **chosen)) == name
    for wrong in ({"controlnet": "xl"}, {"refiner": "canny"}, {"refiner": "xl", "model": "a"}):
        with pytest.raises(NotFound):
            catalogue.name_for(JobRequest.model_validate({"prompt": "p", "model": "b", **wrong}))
    assert catalogue.with_choices("b") == ["b+canny", "b+xl"]
    catalogue.remove("b")
    with pytest.raises(NotFound):
        catalogue.name("owner/b")  # never the plain one's place


def test_tokens_are_counted_once_and_anew_for_another_model(tmp_path: Path) -> None:
    catalogue = Catalogue(Store(None, tmp_path))
    hello = DescriberHello(pid=1, dtype="float32", model=MODEL)
    catalogue.learn(hello)
    long = JobRequest(prompt="é" * 100)
    assert catalogue.default().uncounted([long, long]) == [long.prompt]
    catalogue.default().tokens.learn([long.prompt], [7])
    catalogue.learn(hello)
    assert catalogue.default().uncounted([long]) == []
    assert catalogue.default().tokens.count(long.prompt) == 7
    catalogue.learn(hello.model_copy(update={"dtype": "bfloat16"}))
    assert catalogue.default().uncounted([long]) == [long.prompt]


def test_principals_are_kept_as_their_keys_names() -> None:
    for principal in (LOCAL_USER, ALICE):
        assert from_column(to_column(principal)) == principal
    assert ALICE != BOB


def test_tasks_go_before_the_commit_and_the_newest_event_says_it_all() -> None:
    outbox = Outbox()
    outbox.to_worker(b"w", Task(job="j", stage="text", attempt=1, recipe=recipe(seed=1)))
    for step in (1, 2):
        outbox.to_client(b"c", JobEvent(job="j", state="denoise", running=True, step=step))
    outbox.to_client(b"c", Done(request=1))
    assert [letter.message.kind for letter in outbox.drain_tasks()] == ["task"]
    first, second = outbox.drain()
    assert isinstance(first.message, Done)
    assert isinstance(second.message, JobEvent)
    assert second.message.step == 2
    assert list(outbox.drain()) == list(outbox.drain_tasks()) == []

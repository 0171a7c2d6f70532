"""Stages that models share: known by digests, for each dtype and each stage's own speedups."""

from orchestrator.dispatch.common_stages import CommonStages
from orchestrator.dispatch.stage_queues import StageQueues
from orchestrator.job import ModelKey
from orchestrator.principal import KeyHolder, Principal
from orchestrator.scheduling.fair_shares import FairShares
from tests.orchestrator.storage.test_job_store import job as stored_job

ONE, OTHER, THIRD = (ModelKey(name, "bfloat16") for name in ("one", "other", "third"))
DIGESTS = (("text", "t"), ("vae", "v"))


def test_models_share_what_has_one_digest_one_dtype_and_the_same_speedups() -> None:
    common = CommonStages()
    compiled = ModelKey("compiled", "bfloat16", ("denoise:compile",))
    quantized = ModelKey("quantized", "bfloat16", ("text:quantize=int8",))
    half = ModelKey("half", "float16")
    models = (ONE, compiled, quantized, half)
    common.learn((model, DIGESTS) for model in models)
    assert common.models("text", compiled) == (ONE, compiled)
    assert common.models("vae", ONE) == (ONE, compiled, quantized)
    assert [common.place("text", model)[1] for model in models] == [ONE, ONE, quantized, half]
    assert common.place("denoise", compiled) == ("denoise", compiled)
    common.learn([(ONE, DIGESTS), (OTHER, (("text", "another"),))])
    assert common.models("text", ONE) == (ONE,)
    assert not common.places


def test_two_names_of_one_model_share_nothing_with_each_other() -> None:
    common = CommonStages()
    common.learn([(ONE, DIGESTS), (ONE, DIGESTS)])
    assert common.models("text", ONE) == (ONE,)
    assert not common.places


def test_nothing_is_shared_beside_workers_of_others() -> None:
    """They may have one of the models alone, or other devices."""
    there = True
    common = CommonStages(lambda: there)
    common.learn([(ONE, DIGESTS), (OTHER, DIGESTS)])
    assert common.models("text", ONE) == (ONE,)
    assert common.place("text", OTHER) == ("text", OTHER)
    there = False
    assert common.models("text", OTHER) == (ONE, OTHER)


def test_jobs_of_models_that_share_a_stage_wait_there_in_one_order() -> None:
    common = CommonStages()
    common.learn([(ONE, DIGESTS), (OTHER, DIGESTS)])
    queues = StageQueues(common=common)
    jobs = {}
    for number, model in enumerate((OTHER, ONE, THIRD, OTHER, ONE)):
        job = stored_job(number)
        recipe = job.recipe.model_copy(update={"revision": model.revision, "dtype": model.dtype})
        jobs[job.id] = job = job._replace(recipe=recipe)
        queues.add(job)
    assert queues.first("text", ONE, 9) == queues.first("text", OTHER, 9) == ["job0", "job1", "job3", "job4"]
    assert queues.first("text", THIRD, 9) == ["job2"]
    assert (queues.at("text", OTHER), queues.at("text", THIRD)) == (4, 1)
    assert queues.ahead_of(jobs["job4"]) == 3
    queues.remove(jobs["job1"])
    assert queues.first("text", ONE, 2) == ["job0", "job3"]


def test_owners_are_served_in_turns_whatever_their_models() -> None:
    common = CommonStages()
    common.learn([(ONE, DIGESTS), (OTHER, DIGESTS)])
    queues = StageQueues(FairShares[Principal](), common=common)
    for number in range(8):
        job = stored_job(number)
        model, owner = (ONE, KeyHolder("a")) if number < 6 else (OTHER, KeyHolder("b"))
        recipe = job.recipe.model_copy(update={"revision": model.revision, "dtype": model.dtype})
        queues.add(job._replace(recipe=recipe, owner=owner))
    assert {"job6", "job7"} < {*queues.first("text", ONE, 4)}

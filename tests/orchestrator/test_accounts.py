"""Which stages work in leases of which GPU, decided from settings and what the driver says."""

import pytest

from orchestrator.accounts import accounts, leased_gpu
from orchestrator.config import StackConfig
from orchestrator.gpus import Gpu
from protocol.errors import BadRequest, DoesNotFit
from protocol.jobs import STAGES

GB = 10**9
ONE = [Gpu(0, "card", 16 * GB, 15 * GB, "1")]
TWO = [*ONE, Gpu(1, "card", 12 * GB, 12 * GB, "1")]


def config(**values: object) -> StackConfig:
    return StackConfig.model_validate(values)


@pytest.mark.parametrize(
    ("settings", "gpus", "wanted"),
    [
        ({}, [], [None, None, None]),
        ({}, ONE, [0, 0, 0]),
        ({}, TWO, [None, None, None]),
        ({"stages": {"denoise": {"gpus": [0]}, "vae": {"gpus": [1]}}}, TWO, [None, 0, 1]),
        ({"stages": {"text": {"device": "cpu"}, "denoise": {"device": "cuda:1"}}}, TWO, [None, 1, None]),
        ({"stages": {"vae": {"max_memory": "3GB"}}}, ONE, [0, 0, None]),
        ({"stages": {"denoise": {"device": "cpu:3"}}}, [], [None, 3, None]),
        ({"stages": {"denoise": {"device": "cuda:x"}}}, ONE, [0, None, 0]),
    ],
)
def test_a_stage_on_one_gpu_without_memory_of_its_own_works_in_leases(
    settings: dict[str, object], gpus: list[Gpu], wanted: list[int | None]
) -> None:
    assert [leased_gpu(config(**settings), stage, gpus) for stage in STAGES] == wanted


def test_budgets_are_what_is_free_or_asked_for_without_what_stages_keep_for_themselves() -> None:
    assert accounts(config(), ONE)[0].budget == 15 * GB
    assert accounts(config(), ONE)[0].foreign == GB
    assert accounts(config(gpus={"0": "12GB"}), ONE)[0].budget == 12 * GB
    assert accounts(config(gpus={"0": "all"}), ONE)[0].budget == 15 * GB
    both = {"denoise": {"gpus": [0, 1], "max_memory": "9GB,4GB"}, "text": {"gpus": [1]}, "vae": {"gpus": [0]}}
    found = accounts(config(stages=both), TWO)
    assert {gpu: account.budget for gpu, account in found.items()} == {0: 6 * GB, 1: 8 * GB}
    simulated = accounts(config(gpus={"3": "5MB"}, stages={"denoise": {"device": "cpu:3"}}), [])
    assert (simulated[3].budget, simulated[3].driver) == (5_000_000, False)


@pytest.mark.parametrize(
    ("settings", "gpus", "error", "words"),
    [
        ({"gpus": {"0": "16GB"}}, ONE, DoesNotFit, "15.0 GB of it are free"),
        ({"gpus": {"4": "16GB"}}, ONE, BadRequest, "no GPU 4"),
        ({"stages": {"denoise": {"gpus": [2]}}}, ONE, BadRequest, "to use GPU 2"),
        ({"stages": {"denoise": {"gpus": [0, 1]}, "vae": {"gpus": [1]}}}, TWO, BadRequest, "Say how much"),
        ({"stages": {"vae": {"gpus": [0], "max_memory": "15GB"}}}, ONE, DoesNotFit, "leave nothing"),
        ({"stages": {"denoise": {"device": "cpu:0"}}}, [], BadRequest, "has no budget"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: dict[str, object], gpus: list[Gpu], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refusal:
        accounts(config(**settings), gpus)
    assert words in str(refusal.value)

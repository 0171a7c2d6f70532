"""What can be leased of each GPU, decided from settings, a placement and what the driver says."""

import pytest

from orchestrator.gpu_driver import GpuInfo, visible_gpus
from orchestrator.memory.margins import FIRST_HEADROOM
from orchestrator.planning.gpu_budgets import accounts, check_budgets
from orchestrator.planning.gpu_rates import UNKNOWN
from orchestrator.planning.hardware import this_hardware
from orchestrator.planning.placement import stand_ins
from orchestrator.planning.planner import check
from orchestrator.planning.stack_plan import first
from orchestrator.settings import AccountSettings, StackConfig
from protocol.errors import BadRequest, DoesNotFit

GB = 10**9
ONE = [GpuInfo(0, "card", 16 * GB, 15 * GB, "1")]
TWO = [*ONE, GpuInfo(1, "card", 12 * GB, 12 * GB, "1")]
CONTEXT = UNKNOWN.context + FIRST_HEADROOM


def lent(here: list[GpuInfo], /, **values: object) -> dict[int, AccountSettings]:
    config = StackConfig.model_validate(values)
    check_budgets(config, here)
    hardware = this_hardware(here, config.gpus, stand_ins(config))
    check(config, hardware)
    return accounts(first(config, here), hardware, here)


def test_a_gpu_gives_what_is_free_or_what_it_is_told_to() -> None:
    assert lent(ONE)[0].budget == 15 * GB
    assert lent(ONE)[0].foreign == GB
    assert lent(ONE, gpus={"0": "12GB"})[0].budget == 12 * GB
    assert lent(ONE, gpus={"0": "all"})[0].budget == 15 * GB
    assert lent([]) == {}


def test_every_gpu_with_a_denoiser_on_it_is_lent_from() -> None:
    assert {gpu: account.budget for gpu, account in lent(TWO).items()} == {0: 15 * GB, 1: 12 * GB}
    assert set(lent(TWO, stages={stage: {"gpus": [1]} for stage in ("text", "denoise", "vae")})) == {1}


def test_what_stages_keep_for_themselves_is_not_lent_with_their_contexts() -> None:
    both = {"denoise": {"gpus": [0, 1], "max_memory": "9GB,4GB"}, "text": {"gpus": [1]}, "vae": {"gpus": [0]}}
    found = lent(TWO, stages=both)
    assert {gpu: a.budget for gpu, a in found.items()} == {0: 6 * GB - CONTEXT, 1: 8 * GB - CONTEXT}
    assert {gpu: a.kept for gpu, a in found.items()} == {0: 9 * GB + CONTEXT, 1: 4 * GB + CONTEXT}


def test_a_cpu_plays_gpus_that_have_budgets() -> None:
    found = lent([], gpus={"3": "5MB", "5": "6MB"}, stages={"denoise": {"device": "cpu:3,5"}})
    assert {gpu: (a.budget, a.driver) for gpu, a in found.items()} == {3: (5_000_000, False), 5: (6_000_000, False)}


@pytest.mark.parametrize(
    ("settings", "gpus", "error", "words"),
    [
        ({"gpus": {"0": "16GB"}}, ONE, DoesNotFit, "15.0 GB of it are free"),
        ({"gpus": {"4": "16GB"}}, ONE, BadRequest, "no GPU 4"),
        (
            {
                "gpus": {"0": "4GB"},
                "stages": {s: {"max_memory": "3GB", "gpus": [0]} for s in ("text", "denoise", "vae")},
            },
            ONE,
            DoesNotFit,
            "leaves nothing of 4.0 GB",
        ),
        ({"stages": {"denoise": {"gpus": [2]}}}, ONE, BadRequest, "to use GPU 2"),
        ({"stages": {"vae": {"gpus": [0], "max_memory": "15GB"}}}, ONE, DoesNotFit, "leaves nothing"),
        ({"stages": {"vae": {"gpus": [0], "max_memory": "1GB,2GB"}}}, ONE, BadRequest, "2 amounts for 1 GPU"),
        ({"stages": {"denoise": {"device": "cpu:0"}}}, [], BadRequest, "has no budget"),
        ({"placement": "split"}, ONE, BadRequest, "takes several GPUs"),
        ({"placement": "context", "stages": {"denoise": {"quantize": "fp8"}}}, TWO, BadRequest, "--quantize"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: dict[str, object], gpus: list[GpuInfo], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refusal:
        lent(gpus, **settings)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1", [1]),
        ("2, 0", [0, 2]),
        ("GPU-b", [1]),
        ("GPU-", []),
        ("0,7,1", [0]),
        ("no", []),
    ],
)
def test_gpus_that_are_not_visible_are_left_alone(value: str | None, found: list[int]) -> None:
    assert visible_gpus(value, ["GPU-aa", "GPU-ba", "GPU-ca"]) == found

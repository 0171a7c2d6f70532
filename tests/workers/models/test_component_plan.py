"""How a component is loaded is decided by sizes alone."""

import pytest
import torch

from protocol.errors import DoesNotFit
from protocol.stages import Stage
from workers.models.component_plan import (
    AmongRanks,
    ComponentPlan,
    InLeases,
    Resident,
    Spread,
    WholeOn,
    needs_size,
    plan_component,
)
from workers.models.devices import Devices

GPU = torch.device("cuda", 0)


def planned(
    size: int, room: dict[int, int], stage: Stage = "denoise", ranks: bool = False, **given: object
) -> ComponentPlan:
    devices = Devices(GPU, room, workspace=10, **given)
    return plan_component("part of 'm'", size, stage, devices, room, ranks)


def test_what_works_in_leases_stays_in_host_memory_whatever_room_there_is() -> None:
    assert planned(5, {0: 100}, leased=True) == InLeases(whole=False)
    assert planned(5, {}, "vae", leased=True) == InLeases(whole=True)


def test_ranks_have_their_room_without_the_workspace() -> None:
    assert planned(5, {0: 100}, ranks=True) == AmongRanks(90, leased=False)
    assert planned(5, {}, ranks=True, leased=True) == AmongRanks(None, leased=True)


def test_a_device_without_a_limit_takes_all() -> None:
    assert planned(5, {}) == WholeOn(None)


def test_the_first_gpu_that_holds_it_beside_the_workspace_gets_it() -> None:
    assert planned(90, {0: 100, 1: 500}) == Resident(0, 90)
    assert planned(91, {0: 100, 1: 500}) == WholeOn(1)


def test_several_gpus_hold_what_none_holds_alone() -> None:
    assert planned(100, {0: 70, 1: 70}) == Spread({0: 60, 1: 60})


def test_what_none_holds_is_streamed_through_the_first_but_no_vae() -> None:
    assert planned(500, {0: 100, 1: 70}) == Resident(0, 90)
    assert planned(500, {0: 5}) == Resident(0, 0)
    with pytest.raises(DoesNotFit, match="part of 'm' has 500 B of weights") as caught:
        planned(500, {0: 100}, "vae")
    assert "--gpus vae=1" in caught.value.hint


def test_sizes_are_read_only_where_they_decide() -> None:
    assert needs_size(Devices(GPU, {0: 1}), among_ranks=False)
    assert not needs_size(Devices(GPU, {0: 1}), among_ranks=True)
    assert not needs_size(Devices(GPU, {0: 1}, leased=True), among_ranks=False)
    assert not needs_size(Devices(GPU), among_ranks=False)

"""Values cross between stages as they were, as shapes where only those matter, and others not at all."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling

from workers.replay import call_record
from workers.replay.call_record import CallRecord
from workers.replay.values import Output, Untransferable, freeze, thaw

CPU = torch.device("cpu")


def crossed(value: object) -> Any:
    """A value as another stage has it."""
    record = CallRecord()
    record.add("x", value, CPU)
    received = CallRecord.unpack(record.pack())
    return received.value(received.calls[0], CPU)


def test_plain_values_come_back_as_they_were() -> None:
    values: list[Any] = [
        None, True, 3, 0.1, "x", torch.bfloat16, torch.arange(3), [torch.ones(2), None], (1, [2.5]), {"a": {}},
        np.arange(3), np.float32(2.5), torch.ones(0),
    ]  # fmt: skip
    assert repr(crossed(values)) == repr(values)


def test_a_tensor_keeps_its_layout_by_which_kernels_are_chosen() -> None:
    picture = torch.arange(24.0).reshape(1, 2, 4, 3).permute(0, 3, 1, 2)  # as of NumPy
    for tensor in (picture, torch.ones(2, 3).T, torch.arange(6).reshape(2, 3).T):
        found = crossed(tensor)
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
    assert torch.equal(crossed(picture[:, :2]), picture[:, :2])
    assert torch.equal(crossed(torch.ones(1, 3).expand(2, 3)), torch.ones(2, 3))


def test_an_output_is_read_as_its_own_class_is() -> None:
    found = crossed(BaseModelOutputWithPooling(last_hidden_state=torch.ones(1), hidden_states=(torch.zeros(1),)))
    assert isinstance(found, Output)
    assert torch.equal(found.last_hidden_state, found[0])
    assert torch.equal(found.hidden_states[-1], found["hidden_states"][-1])
    assert found.pooler_output is None
    assert len(found.to_tuple()) == 2
    assert not hasattr(found, "latents")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_distribution_is_sampled_as_it_would_have_been(deterministic: bool) -> None:
    parameters = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    real = AutoencoderKLOutput(DiagonalGaussianDistribution(parameters, deterministic))
    found = crossed(real)
    wanted, drawn = (o.latent_dist.sample(torch.Generator().manual_seed(1)) for o in (real, found))
    assert torch.equal(wanted, drawn)
    assert torch.equal(real.latent_dist.mode(), found.latent_dist.mode())


def test_of_shapes_only_numbers_are_zeros_and_masks_stay() -> None:
    record = CallRecord()
    record.add("x", (torch.ones(2, 3), torch.arange(3), {"a": torch.ones(1, dtype=torch.bfloat16)}), CPU)
    received = CallRecord.unpack(record.shapes_only().pack())
    numbers, indices, named = received.value(received.calls[0], CPU)
    assert (numbers.tolist(), indices.tolist(), named["a"].dtype) == ([[0.0] * 3] * 2, [0, 1, 2], torch.bfloat16)
    assert sum(tensor.nbytes for tensor in record.shapes_only().pack()[1:]) == 24


def test_objects_do_not_cross_and_nothing_else_is_taken_for_a_value() -> None:
    for bad in (object(), {(1, 2): 3}, [lambda: 0], torch.Generator()):
        with pytest.raises(Untransferable):
            freeze(bad, CPU, lambda tensor: 0)
    for frozen in (
        {"tensor": 0},
        {"class": "os.system"},
        {"distribution": "os", "parameters": 1, "deterministic": True},
    ):
        with pytest.raises(ValueError, match="none can hold"):
            thaw(frozen, [], CPU)


def test_zeros_stand_in_for_forwards_in_their_order() -> None:
    record = CallRecord()
    for size in (2, 2, 3):
        record.add_forward((torch.ones(size),), CPU)
    received = CallRecord.unpack(record.pack())
    assert len(received.forwards) == 2
    assert [received.forward(i, CPU)[0].shape[0] for i in range(3)] == [2, 2, 3]
    with pytest.raises(call_record.Unprepared, match="more often"):
        received.forward(3, CPU)


def test_a_tensor_larger_than_a_frame_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_record, "MOST_BYTES", 1000)
    record, large = CallRecord(), torch.rand(3, 700)
    record.add("vae.decode", (large, torch.arange(5)), torch.device("cpu"))
    packed = record.pack()
    assert max(tensor.nbytes for tensor in packed) <= 1000
    read = CallRecord.unpack(packed[::-1])
    found, small = read.value(read.calls[0], torch.device("cpu"))
    assert torch.equal(found, large)
    assert torch.equal(small, torch.arange(5))

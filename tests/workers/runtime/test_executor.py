"""A worker sends no result that a message can't hold."""

import pytest

from protocol.tensors import Tensor
from workers.errors import StageError
from workers.runtime import executor
from workers.stages.contract import Outcome


def test_what_no_message_can_hold_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "MAX_FRAME_BYTES", 10)
    executor.check_can_travel(Outcome([Tensor("a", "uint8", (10,), bytes(10))], next="vae"))
    with pytest.raises(StageError, match="it leaves a tensor of 11 B; 10 B can travel"):
        executor.check_can_travel(Outcome([Tensor("a", "uint8", (11,), bytes(11))], next="vae"))

"""What a worker makes of its spec before it loads."""

import pytest

from protocol.model_spec import DEMO, ModelSpec
from protocol.worker_spec import WorkerSpec
from workers.models.description import describe
from workers.models.source import locate
from workers.runtime import worker
from workers.runtime.worker import prepare


def test_a_model_is_described_once_unless_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = describe(locate(ModelSpec(name=DEMO), "denoise"))
    made: list[str] = []

    def counted(source: object) -> object:
        made.append("described")
        return found

    monkeypatch.setattr(worker, "describe", counted)
    spec = WorkerSpec(stage="denoise", name="denoise-1", device="cpu", description=found)
    assert prepare(spec).description == found
    assert not made
    for other in (None, found.model_copy(update={"revision": "another"})):
        assert prepare(spec.model_copy(update={"description": other})).description == found
    assert len(made) == 2

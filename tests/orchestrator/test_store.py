"""What the store keeps, and what it survives."""

from pathlib import Path

import pytest

from orchestrator.live import LiveJob
from orchestrator.store import INLINE_BYTES, Store
from protocol.errors import TriptychError
from protocol.jobs import StageRecord
from protocol.tensors import Tensor
from tests.protocol.test_recipes import recipe

SMALL = (Tensor("a", "float32", (2,), b"12345678"), Tensor("b.0", "uint8", (0,), b""))
LARGE = (Tensor("a", "uint8", (INLINE_BYTES + 1,), bytes(INLINE_BYTES + 1)),)


def open_store(folder: Path) -> Store:
    (folder / "artifacts").mkdir(exist_ok=True)
    return Store(folder / "jobs.sqlite", folder / "artifacts")


def job(number: int) -> LiveJob:
    return LiveJob(
        id=f"job{number}",
        number=number,
        priority=0,
        recipe=recipe(seed=number),
        text_key="k",
        request="{}",
        created=1.0,
    )


def test_a_job_comes_back_as_it_was(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    kept = job(store.next_number())
    store.insert(kept)
    kept.hand_to("w")
    kept.finish_stage(StageRecord(stage="text", worker="text-1", attempt=1, seconds=0.5, warnings=("w",)))
    kept.reasons = ("why",)
    store.update(kept)
    store.close()
    again = open_store(tmp_path)
    assert again.job("job1") == kept
    assert list(again.unfinished()) == [kept]
    assert again.next_number() == 2


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    store, other = open_store(tmp_path), open_store(tmp_path)
    store.insert(job(1))
    assert other.job("job1") is None
    store.commit()
    assert other.job("job1") is not None


@pytest.mark.parametrize("tensors", [SMALL, LARGE], ids=["in the database", "in a file"])
def test_tensors_come_back_as_they_were(tmp_path: Path, tensors: tuple[Tensor, ...]) -> None:
    store = open_store(tmp_path)
    store.put("text", "k", tensors)
    store.close()
    found = open_store(tmp_path).get("text", "k")
    assert found is not None
    assert [(t.spec, bytes(t.data)) for t in found] == [(t.spec, bytes(t.data)) for t in tensors]


def test_a_file_that_is_gone_or_cut_short_counts_as_no_artifact(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("text", "k", LARGE)
    store.commit()
    (file,) = (tmp_path / "artifacts").iterdir()
    file.write_bytes(b"short")
    assert store.get("text", "k") is None
    file.unlink()
    assert store.get("text", "k") is None


def test_files_go_with_their_rows_and_rubbish_goes_at_the_next_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("latents", "j", LARGE)
    store.commit()
    store.drop("latents", "j")
    assert list((tmp_path / "artifacts").iterdir()) != []  # until the row's end is safe
    store.commit()
    assert list((tmp_path / "artifacts").iterdir()) == []
    (tmp_path / "artifacts" / "text-left-by-a-crash").write_bytes(b"x")
    store.close()
    open_store(tmp_path)
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_the_longest_unused_goes_first_and_what_is_needed_stays(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in "abcd":
        store.put("text", name, SMALL)
    store.touch("text", "a")
    assert store.bytes_of["text"] == 32
    assert store.shrink("text", 16, spare=("b",)) == ["c", "d"]
    assert store.bytes_of["text"] == 16
    assert [store.has("text", name) for name in "abcd"] == [True, True, False, False]


def test_a_database_of_another_release_or_no_database_is_refused(tmp_path: Path) -> None:
    import sqlite3

    store = open_store(tmp_path)
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(TriptychError, match="schema 99"):
        open_store(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "jobs.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(TriptychError, match="can't be used"):
        open_store(broken)


def test_a_database_of_an_earlier_release_goes_on_with_its_jobs(tmp_path: Path) -> None:
    import sqlite3

    store = open_store(tmp_path)
    store.put("text", "a", SMALL)
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("DROP TABLE workspaces")
        db.execute("PRAGMA user_version = 1")
    upgraded = open_store(tmp_path)
    assert upgraded.has("text", "a")
    upgraded.remember_workspace("k", 5)
    upgraded.close()
    assert open_store(tmp_path).workspaces() == {"k": 5}

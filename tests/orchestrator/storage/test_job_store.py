"""What the store keeps, and what it survives."""

from pathlib import Path

import msgpack
import pytest

from orchestrator.job import LiveJob
from orchestrator.storage.artifacts import INLINE_BYTES
from orchestrator.storage.database import FIRST_SCHEMA, restore
from orchestrator.storage.job_store import Store
from protocol.errors import StateDamaged, StateUnusable, TriptychError
from protocol.job import StageRecord
from protocol.tensors import Tensor
from tests.protocol.test_recipe import recipe

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
    record = StageRecord(stage="text", worker="text-1", attempt=1, seconds=0.5, warnings=("w",))
    kept = kept._replace(attempt=1, attempts=1, state="denoise", stage="denoise", records=(record,), reasons=("why",))
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
    store.artifacts.put("text", "k", tensors)
    store.close()
    found = open_store(tmp_path).artifacts.get("text", "k")
    assert found is not None
    assert [(t.spec, bytes(t.data)) for t in found] == [(t.spec, bytes(t.data)) for t in tensors]


def test_a_file_that_is_gone_or_cut_short_counts_as_no_artifact(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.artifacts.put("text", "k", LARGE)
    store.commit()
    (file,) = (tmp_path / "artifacts").iterdir()
    file.write_bytes(b"short")
    assert store.artifacts.get("text", "k") is None
    file.unlink()
    assert store.artifacts.get("text", "k") is None


def test_files_go_with_their_rows_and_rubbish_goes_at_the_next_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.artifacts.put("latents", "j", LARGE)
    store.commit()
    store.artifacts.drop("latents", "j")
    assert list((tmp_path / "artifacts").iterdir()) != []  # until the row's end is safe
    store.commit()
    assert list((tmp_path / "artifacts").iterdir()) == []
    (tmp_path / "artifacts" / f"text-{'0' * 24}").write_bytes(b"x")
    store.close()
    open_store(tmp_path)
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_the_longest_unused_goes_first_and_what_is_needed_stays(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in "abcd":
        store.artifacts.put("text", name, SMALL)
    store.artifacts.touch("text", "a")
    assert store.artifacts.bytes_of["text"] == 32
    assert store.artifacts.shrink("text", 16, spare=("b",)) == ["c", "d"]
    assert store.artifacts.bytes_of["text"] == 16
    assert [store.artifacts.has("text", name) for name in "abcd"] == [True, True, False, False]


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
    with pytest.raises(StateDamaged, match="is damaged"):
        open_store(broken)


def test_a_database_of_an_earlier_release_goes_on_with_its_jobs(tmp_path: Path) -> None:
    import sqlite3

    (tmp_path / "artifacts").mkdir()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.executescript(f"{FIRST_SCHEMA} PRAGMA user_version = 1;")
        db.execute("INSERT INTO artifacts VALUES('text/a', 'text', ?, ?, NULL, 8, 1)", (msgpack.packb([]), b""))
    upgraded = open_store(tmp_path)
    assert upgraded.artifacts.get("text", "a") == ()  # without a checksum
    upgraded.remember_workspace("k", 5)
    upgraded.set("x", "y")
    upgraded.insert(job(1))
    upgraded.close()
    again = open_store(tmp_path)
    assert (again.workspaces(), again.setting("x"), again.setting("none")) == ({"k": 5}, "y", "")
    assert again.job("job1") == job(1)


def test_what_is_not_as_it_was_written_counts_as_gone(tmp_path: Path) -> None:
    import sqlite3

    store = open_store(tmp_path)
    store.artifacts.put("text", "small", SMALL)
    store.artifacts.put("text", "large", LARGE)
    store.close()
    (file,) = (tmp_path / "artifacts").iterdir()
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("UPDATE artifacts SET data = x'3132333435363739' WHERE key = 'text/small'")
    again = open_store(tmp_path)
    assert again.artifacts.get("text", "small") is None
    assert again.artifacts.get("text", "large") is None


def test_a_backup_has_the_jobs_and_takes_the_place_of_a_damaged_database(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(200):
        store.insert(job(number + 1))
    store.set("drained", "[]")
    backup = tmp_path / "jobs.backup.sqlite"
    store.back_up(backup)
    store.insert(job(201))
    store.close()
    database = tmp_path / "jobs.sqlite"
    data = bytearray(database.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    database.write_bytes(data)
    with pytest.raises(StateDamaged, match="--restore"):
        open_store(tmp_path)
    aside = restore(database, backup)
    assert aside is not None
    assert aside.read_bytes() == data
    again = open_store(tmp_path)
    assert len(list(again.unfinished())) == 200
    assert again.setting("drained") == "[]"
    assert again.job("job7") == job(7)
    with pytest.raises(StateUnusable, match="no backup"):
        restore(database, tmp_path / "nothing")


def test_a_database_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateUnusable, match="can't be used"):
        Store(tmp_path / "no-such-folder" / "jobs.sqlite", tmp_path)


def test_old_jobs_are_forgotten_with_what_they_left(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in (1, 2, 3):
        ended = job(number)
        store.insert(ended)
        store.update(ended._replace(state="failed", finished=float(number)))
        store.artifacts.put("latents", ended.id, SMALL)
    (first,) = store.ended_before(2.0, 10)
    store.forget(first)
    assert store.job("job1") is None
    assert not store.artifacts.has("latents", "job1")
    assert store.artifacts.has("latents", "job2")
    assert store.counts() == {"failed": 2}


def test_parts_go_with_what_they_are_parts_of(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("a", "ab", "a0"):
        store.artifacts.put("pictures", name, SMALL)
        for number in (1, 2, 10):
            store.artifacts.put_part("pictures", name, number, LARGE)
    assert store.artifacts.parts("pictures", "a") == [1, 2, 10]
    assert store.artifacts.get_part("pictures", "a", 0) == store.artifacts.get("pictures", "a")
    assert store.artifacts.get_part("pictures", "a", 10) is not None
    assert store.artifacts.get_part("pictures", "a", 3) is None
    store.artifacts.drop("pictures", "a")
    store.commit()
    assert store.artifacts.parts("pictures", "a") == []
    assert store.artifacts.parts("pictures", "ab") == store.artifacts.parts("pictures", "a0") == [1, 2, 10]
    assert len(list((tmp_path / "artifacts").iterdir())) == 6
    assert store.artifacts.shrink("pictures", INLINE_BYTES * 4) == ["ab"]
    assert store.artifacts.parts("pictures", "ab") == []
    assert store.artifacts.specs("pictures", "a0") == [tensor.spec for tensor in SMALL]
    assert store.artifacts.specs("pictures", "ab") == []

"""What a stack stands on is its own: it removes nothing of others', and notices what others remove."""

import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from orchestrator.cli.run import SCRATCH, remove_left_behind
from orchestrator.state_folder import StackFolder
from orchestrator.storage.database import Database
from orchestrator.supervisor import child
from protocol.errors import DoesNotFit, StateUnusable
from protocol.job import JobRequest
from tests.fakes import FakeWorker, orchestrator
from tests.stacks import RunningStack, running_stack, triptych


def finish_one(workers: list[FakeWorker]) -> None:
    for worker in workers:
        worker.finish(worker.take())


def test_a_folder_that_holds_others_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (thesis := tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StateUnusable, match="thesis"):
        StackFolder(tmp_path).create()
    refused = triptych("up", folder=tmp_path)
    assert refused.returncode == 7
    assert thesis.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_files_of_others_among_artifacts_stay(state: Path, tmp_path: Path) -> None:
    with orchestrator(state):
        pass
    artifacts = state / "artifacts"
    (artifacts / "thesis.txt").write_text("years of work")
    (artifacts / "folder").mkdir()
    (artifacts / "latents-thesis").write_text("of work")
    rubbish = artifacts / f"latents-{'0' * 24}"
    rubbish.write_bytes(b"of a crash")
    (artifacts / f"text-{'1' * 24}").symlink_to(artifacts / "thesis.txt")
    with orchestrator(state):
        pass
    kept = {"thesis.txt", "folder", "latents-thesis", f"text-{'1' * 24}"}
    assert {path.name for path in artifacts.iterdir()} == kept
    shutil.move(artifacts, tmp_path / "elsewhere")
    artifacts.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateUnusable, match="is a link"):
        StackFolder(state).create()
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == kept


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs(a)")
    other.close()
    with pytest.raises(StateUnusable, match="another program's"):
        Database(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused_for_root_too(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(StateUnusable, match="belongs to another user"):
        StackFolder(tmp_path).create()


def test_folders_of_runs_that_were_killed_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ("aaaaaaaa", "bbbbbbbb", "cccccccc")
    dead, alive, strange = (tmp_path / f"{SCRATCH}{name}" for name in names)
    for folder in (dead, alive, strange):
        folder.mkdir()
    for folder in (dead, alive):
        (folder / "supervisor.lock").touch()
    with StackFolder(alive).lock("supervisor"):
        remove_left_behind()
    assert {path.name for path in tmp_path.iterdir()} == {alive.name, strange.name}


def test_space_is_given_back(state: Path) -> None:
    with orchestrator(state, queue_limit=5000) as running:
        workers = [running.worker(stage).ready() for stage in ("text", "denoise", "vae")]
        client = running.client()
        jobs = client.submit_many([JobRequest(prompt="x" * 5000 + str(n), seed=n) for n in range(1200)])
        client.cancel(*(job.id for job in jobs))
        before = (state / "jobs.sqlite").stat().st_size
        assert before > 5_000_000
        count, _ = client.collect_garbage(0)
        assert count == 1200
        assert (state / "jobs.sqlite").stat().st_size < before / 5
        del workers


def test_what_is_removed_beneath_a_stack_is_made_again_and_no_job_is_lost(flux_schnell: Path, state: Path) -> None:
    with running_stack(state, "--model", str(flux_schnell), "--device", "cpu") as stack:
        first, picture = stack.picture("a red circle", seed=1, steps=2, width=32, height=32)
        remove_and_return(stack, state / "jobs.sqlite")
        assert stack.client.job(first.id).state == "done"
        again, same = stack.picture("a red circle", seed=1, steps=2, width=32, height=32)
        assert same.equal(picture)
        shutil.rmtree(state / "artifacts")
        stack.picture("a blue star", seed=1, steps=2, width=128, height=128)
        remove_and_return(stack, state / "sockets")
        assert stack.client.job(again.id).state == "done"


def test_a_describer_that_is_killed_comes_back_and_prompts_are_counted_again(flux_schnell: Path, state: Path) -> None:
    with running_stack(state, "--model", str(flux_schnell), "--device", "cpu") as stack:
        while not (before := process(stack, "describer")):
            pass
        os.kill(before, signal.SIGKILL)
        with pytest.raises(DoesNotFit, match="tokens"):
            stack.client.submit("far too long " * 400, seed=1)
        while process(stack, "describer") in (None, before):
            pass
        job, _ = stack.picture("a red circle", seed=1, steps=2, width=32, height=32)
        assert job.state == "done"


def process(stack: RunningStack, name: str) -> int | None:
    """Return its number, None while there is none."""
    return next((p.pid for p in stack.client.workers().processes if p.name == name), None)


def test_logs_are_put_aside_while_their_process_goes_on_writing(tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    code = f"import os; print('x' * 2000, flush=True)\nwhile not os.path.exists({str(go_on)!r}): pass\nprint('after')"
    reading, _ = pipe = os.pipe()
    talker = child.Child("talker", None, ("-c", code), "", tmp_path / "talker.log", reading, log_limit=1000)
    try:
        talker.start()
        assert talker.process
        while not talker.log.exists() or talker.log.stat().st_size < 2000:
            pass
        talker.rotate_log()
        go_on.touch()
        assert talker.process.wait(30) == 0
    finally:
        talker.kill()
        for end in pipe:
            os.close(end)
    assert talker.log.read_text() == "after\n"
    assert talker.log.with_suffix(".log.1").read_text() == "x" * 2000 + "\n"


def remove_and_return(stack: RunningStack, path: Path) -> None:
    """Remove something, and wait until the orchestrator is there again as a new process."""
    before = stack.client.stack().pid
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    while process(stack, "orchestrator") in (None, before):
        pass

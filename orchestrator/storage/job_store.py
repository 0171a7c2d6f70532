"""Jobs, artifacts and models on disk: all that must outlive the orchestrator.

Writes gather in one transaction until `commit()`; the server sends nothing that depends on them before that.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.job import LiveJob, records_from_json
from orchestrator.principal import Principal, from_column, to_column
from orchestrator.storage.artifacts import OF_A_JOB, Artifacts
from orchestrator.storage.database import Database
from protocol.job import ENDED, JobState, Recipe
from protocol.model import ModelDescription

COLUMNS = (
    "number, id, state, stage, priority, recipe, request, text_key, attempt, failures, step, cached, records, reasons, "
    "created, finished, pictures, saved, owner"
)


class Store:
    """The only place where the orchestrator keeps what must outlive it."""

    def __init__(self, database: Path | None, artifacts: Path) -> None:
        """Open the store; without a database nothing outlives it. StateDamaged, StateUnusable."""
        self._db = Database(database)
        self.artifacts = Artifacts(self._db, artifacts)
        self._changed: dict[int, LiveJob] = {}  # to be written at the next commit, however often they changed
        self._noted: dict[int, LiveJob] = {}  # to be written before the next look, if not sooner
        row: Any = self._db.first("SELECT max(number) FROM jobs")
        self._last_number: int = row[0] or 0

    def close(self) -> None:
        self.commit()
        self._db.close()

    def commit(self) -> None:
        """Make everything written so far safe on disk."""
        self._flush()
        self.artifacts.make_safe()
        self._db.commit()
        self.artifacts.committed()

    def reclaim(self) -> None:
        """Give the space of what was removed back to the disk."""
        self.commit()
        self._db.reclaim()

    def write_anew(self) -> None:
        """Write the database's file again, which was removed beneath it, with all that was committed."""
        self.commit()
        self._db.write_anew()

    def back_up(self, to: Path) -> None:
        """Copy the jobs, beside the database."""
        self.commit()
        self._db.back_up(to)

    # -- jobs -----------------------------------------------------------------------------------

    def next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def insert(self, job: LiveJob) -> None:
        self._db.write(
            f"INSERT INTO jobs({COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                job.number, job.id, job.state, job.stage, job.priority, job.recipe.model_dump_json(), job.request,
                job.text_key, job.attempts, job.failures, job.step, job.cached, job.records_json(),
                json.dumps(job.reasons), job.created, job.finished, job.pictures, job.saved, to_column(job.owner),
            ),
        )  # fmt: skip

    def update(self, job: LiveJob) -> None:
        """Write a job's state with the next commit, as it is then."""
        self._changed[job.number] = job
        self._noted.pop(job.number, None)

    def note(self, job: LiveJob) -> None:
        """Note a change that a crash may take back: nobody was promised it, but whoever looks sees it."""
        (self._changed if job.number in self._changed else self._noted)[job.number] = job

    def _flush(self) -> None:
        while self._changed:
            self._write_state(self._changed.popitem()[1])

    def _write_state(self, job: LiveJob) -> None:
        self._db.write(
            "UPDATE jobs SET state=?, stage=?, attempt=?, failures=?, step=?, cached=?, records=?, reasons=?,"
            " finished=?, pictures=?, saved=? WHERE number=?",
            (
                job.state, job.stage, job.attempts, job.failures, job.step, job.cached, job.records_json(),
                json.dumps(job.reasons), job.finished, job.pictures, job.saved, job.number,
            ),
        )  # fmt: skip

    def job(self, job_id: str) -> LiveJob | None:
        return next(self._select("WHERE id = ?", (job_id,)), None)

    def unfinished(self) -> Iterator[LiveJob]:
        return self._select(f"WHERE state NOT IN ({','.join('?' * len(ENDED))}) ORDER BY number", tuple(ENDED))

    def newest(
        self, states: Sequence[JobState], limit: int, owner: Principal | None = None, before: int = 0
    ) -> Iterator[LiveJob]:
        """Find jobs, newest first; of one owner, or of all; those with numbers below `before`, 0: of all."""
        wanted = [f"state IN ({','.join('?' * len(states))})"] if states else []
        values: list[object] = [*states]
        if owner is not None:
            wanted.append("owner = ?")
            values.append(to_column(owner))
        if before:
            wanted.append("number < ?")
            values.append(before)
        where = f"WHERE {' AND '.join(wanted)}" if wanted else ""
        return self._select(f"{where} ORDER BY number DESC LIMIT ?", (*values, limit))

    def counts(self) -> dict[JobState, int]:
        rows: Any = self._db.read("SELECT state, count(*) FROM jobs GROUP BY state")
        return dict(rows)

    def ended_before(self, moment: float, limit: int) -> list[LiveJob]:
        """Jobs that ended before a moment, in seconds since the epoch; the oldest `limit`."""
        return list(self._select("WHERE finished < ? ORDER BY finished LIMIT ?", (moment, limit)))

    def forget(self, job: LiveJob) -> None:
        """Remove a job that has ended, and what it left."""
        for kind in OF_A_JOB:
            self.artifacts.drop(kind, job.id)
        self._db.write("DELETE FROM jobs WHERE number = ?", (job.number,))

    def _select(self, clause: str, values: Sequence[object]) -> Iterator[LiveJob]:
        self._changed |= self._noted
        self._noted.clear()
        self._flush()
        rows: Any = self._db.read(f"SELECT {COLUMNS} FROM jobs {clause}", values)
        for row in rows:
            number, id_, state, stage, priority, recipe, request, text_key, attempts, failures, *rest = row
            step, cached, records, reasons, created, finished, pictures, saved, owner = rest
            yield LiveJob(
                id=id_, number=number, priority=priority, recipe=Recipe.model_validate_json(recipe),
                text_key=text_key, request=request, created=created, state=state, stage=stage, attempt=attempts,
                attempts=attempts, failures=failures, step=step,
                cached=bool(cached), records=records_from_json(records), reasons=tuple(json.loads(reasons)),
                finished=finished, pictures=pictures, saved=saved, owner=from_column(owner),
            )  # fmt: skip

    # -- models ---------------------------------------------------------------------------------

    def remember_model(self, model: ModelDescription) -> None:
        self._db.write(
            "INSERT INTO models(revision, description) VALUES(?,?)"
            " ON CONFLICT(revision) DO UPDATE SET description=excluded.description",
            (model.revision, model.model_dump_json()),
        )

    def workspaces(self) -> dict[str, int]:
        """Return what stages were seen to take beside their weights, in bytes, by stage, model and size."""
        rows: Any = self._db.read("SELECT key, bytes FROM workspaces")
        return dict(rows)

    def remember_workspace(self, key: str, size: int) -> None:
        self._db.write("INSERT OR REPLACE INTO workspaces VALUES(?,?)", (key, size))

    def remember_step_seconds(self, key: str, seconds: float) -> None:
        """Keep the shortest seconds that a stage's step took; see `experience`."""
        self._db.write(
            "INSERT INTO paces VALUES(?,?) ON CONFLICT(key) DO UPDATE SET seconds=min(seconds, excluded.seconds)",
            (key, seconds),
        )

    def setting(self, key: str) -> str:
        """Return a decision of a run that outlives it; empty if there was none."""
        row: Any = self._db.first("SELECT value FROM settings WHERE key = ?", (key,))
        return row[0] if row else ""

    def set(self, key: str, value: str) -> None:
        self._db.write("INSERT OR REPLACE INTO settings VALUES(?,?)", (key, value))

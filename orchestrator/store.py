"""Jobs, artifacts and models on disk: SQLite in WAL mode, `synchronous=FULL`, one writer.

Writes gather in one transaction until `commit()`; the server sends nothing that depends on them before that. Small
artifacts live in the database, in the same transaction as the job that they belong to; large ones in files beside it,
written whole before the row that names them. A file without a row is rubbish of a crash and removed at the next start.
"""

import json
import math
import os
import sqlite3
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import msgpack

from orchestrator.live import LiveJob, records_from_json
from protocol.errors import TriptychError
from protocol.jobs import JobState, ModelDescription, Recipe
from protocol.tensors import ITEMSIZE, Tensor, checked

SCHEMA_VERSION = 2
INLINE_BYTES = 128 << 10  # up to here SQLite is faster than a file of its own
SCHEMA = """
CREATE TABLE jobs(
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, stage TEXT NOT NULL,
    priority INTEGER NOT NULL, recipe TEXT NOT NULL, request TEXT NOT NULL, text_key TEXT NOT NULL,
    attempt INTEGER NOT NULL, failures INTEGER NOT NULL, step INTEGER NOT NULL, cached INTEGER NOT NULL,
    records TEXT NOT NULL, reasons TEXT NOT NULL, created REAL NOT NULL, finished REAL, pictures INTEGER NOT NULL);
CREATE INDEX jobs_by_state ON jobs(state, number);
CREATE TABLE artifacts(
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, specs BLOB NOT NULL, data BLOB, file TEXT, bytes INTEGER NOT NULL,
    used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX artifacts_by_use ON artifacts(kind, used);
CREATE TABLE models(revision TEXT PRIMARY KEY, description TEXT NOT NULL, tokenizer BLOB);
"""
UPGRADES = {1: "CREATE TABLE workspaces(key TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;"}  # from a version
COLUMNS = (
    "number, id, state, stage, priority, recipe, request, text_key, attempt, failures, step, cached, records, reasons, "
    "created, finished, pictures"
)


class Store:
    """The only place where the orchestrator keeps what must outlive it."""

    def __init__(self, database: Path, artifacts: Path) -> None:
        self._artifacts = artifacts
        self._db = self._open(database)
        self._open_transaction = False
        self._changed: dict[int, LiveJob] = {}  # to be written at the next commit, however often they changed
        self._noted: dict[int, LiveJob] = {}  # to be written before the next look, if not sooner
        self._doomed: list[Path] = []  # files to remove once the transaction that let them go is safe
        row = self._db.execute("SELECT max(number) FROM jobs").fetchone()
        self._last_number: int = row[0] or 0
        self.bytes_of = {
            kind: self._db.execute("SELECT coalesce(sum(bytes), 0) FROM artifacts WHERE kind = ?", (kind,)).fetchone()[
                0
            ]
            for kind in ("text", "latents", "pictures")
        }
        self._clock = time.time_ns()
        self._sweep()

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(path, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            steps = [*([SCHEMA] if version == 0 else []), *(sql for old, sql in UPGRADES.items() if old >= version)]
            if steps and version < SCHEMA_VERSION:
                db.executescript(f"BEGIN; {' '.join(steps)} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise TriptychError(
                f"The job database {str(path)!r} can't be used: {error}.", "Give another folder with --state DIR."
            ) from error
        if version > SCHEMA_VERSION:
            raise TriptychError(
                f"The job database {str(path)!r} has schema {version}; this release knows {SCHEMA_VERSION}.",
                "Use the release that wrote it, or give another folder with --state DIR.",
            )
        return db

    def _sweep(self) -> None:
        known = {name for (name,) in self._db.execute("SELECT file FROM artifacts WHERE file IS NOT NULL")}
        for path in self._artifacts.iterdir():
            if path.name not in known:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        self.commit()
        self._db.close()

    # -- transactions ---------------------------------------------------------------------------

    def _write(self, sql: str, values: Sequence[object]) -> None:
        if not self._open_transaction:
            self._db.execute("BEGIN IMMEDIATE")
            self._open_transaction = True
        self._db.execute(sql, values)

    def commit(self) -> None:
        """Make everything written so far safe on disk."""
        self._flush()
        if self._open_transaction:
            self._db.execute("COMMIT")
            self._open_transaction = False
        while self._doomed:
            self._doomed.pop().unlink(missing_ok=True)

    # -- jobs -----------------------------------------------------------------------------------

    def next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def insert(self, job: LiveJob) -> None:
        self._write(
            f"INSERT INTO jobs({COLUMNS}) VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                job.number, job.id, job.state, job.stage, job.priority, job.recipe.model_dump_json(), job.request,
                job.text_key, job.attempt, job.failures, job.step, job.cached, job.records_json(),
                json.dumps(job.reasons), job.created, job.finished, job.pictures,
            ),
        )  # fmt: skip

    def update(self, job: LiveJob) -> None:
        """Write a job's state with the next commit, as it is then."""
        self._changed[job.number] = job
        self._noted.pop(job.number, None)

    def note(self, job: LiveJob) -> None:
        """A change that a crash may take back: nobody was promised it, but whoever looks sees it."""
        if job.number not in self._changed:
            self._noted[job.number] = job

    def _flush(self) -> None:
        while self._changed:
            self._write_state(self._changed.popitem()[1])

    def _write_state(self, job: LiveJob) -> None:
        self._write(
            "UPDATE jobs SET state=?, stage=?, attempt=?, failures=?, step=?, cached=?, records=?, reasons=?,"
            " finished=?, pictures=? WHERE number=?",
            (
                job.state, job.stage, job.attempt, job.failures, job.step, job.cached, job.records_json(),
                json.dumps(job.reasons), job.finished, job.pictures, job.number,
            ),
        )  # fmt: skip

    def job(self, job_id: str) -> LiveJob | None:
        return next(self._select("WHERE id = ?", (job_id,)), None)

    def unfinished(self) -> Iterator[LiveJob]:
        return self._select("WHERE state IN ('queued', 'text', 'denoise', 'vae') ORDER BY number", ())

    def newest(self, states: Sequence[JobState], limit: int) -> Iterator[LiveJob]:
        where = f"WHERE state IN ({','.join('?' * len(states))})" if states else ""
        return self._select(f"{where} ORDER BY number DESC LIMIT ?", (*states, limit))

    def counts(self) -> dict[JobState, int]:
        return dict(self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state"))

    def _select(self, clause: str, values: Sequence[object]) -> Iterator[LiveJob]:
        self._changed |= self._noted
        self._noted.clear()
        self._flush()
        for row in self._db.execute(f"SELECT {COLUMNS} FROM jobs {clause}", values):
            number, id_, state, stage, priority, recipe, request, text_key, attempt, failures, *rest = row
            step, cached, records, reasons, created, finished, pictures = rest
            yield LiveJob(
                id=id_, number=number, priority=priority, recipe=Recipe.model_validate_json(recipe),
                text_key=text_key, request=request, created=created, state=state, stage=stage, attempt=attempt,
                failures=failures, step=step,
                cached=bool(cached), records=records_from_json(records), reasons=tuple(json.loads(reasons)),
                finished=finished, pictures=pictures,
            )  # fmt: skip

    # -- artifacts ------------------------------------------------------------------------------

    def put(self, kind: str, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep tensors under a name; what was there is replaced."""
        size = sum(t.nbytes for t in tensors)
        specs = msgpack.packb([t.spec for t in tensors])
        blob, file = None, None
        if size <= INLINE_BYTES:
            blob = b"".join(t.data for t in tensors)
        else:
            file = f"{kind}-{os.urandom(12).hex()}"
            with (self._artifacts / file).open("xb") as out:
                for tensor in tensors:
                    out.write(tensor.data)
                out.flush()
                os.fsync(out.fileno())
        values = (f"{kind}/{name}", kind, specs, blob, file, size, self._tick())
        try:
            self._write("INSERT INTO artifacts VALUES(?,?,?,?,?,?,?)", values)
        except sqlite3.IntegrityError:
            self.drop(kind, name)
            self._write("INSERT INTO artifacts VALUES(?,?,?,?,?,?,?)", values)
        self.bytes_of[kind] += size

    def get(self, kind: str, name: str) -> tuple[Tensor, ...] | None:
        """The tensors under a name; None if there are none, or if their file is gone or cut short."""
        query = "SELECT specs, data, file, bytes FROM artifacts WHERE key = ?"
        row = self._db.execute(query, (f"{kind}/{name}",)).fetchone()
        if row is None:
            return None
        specs, blob, file, size = row
        if blob is None:
            try:
                blob = (self._artifacts / file).read_bytes()
            except OSError:
                return None
            if len(blob) != size:
                return None
        return tuple(_split(msgpack.unpackb(specs, use_list=False), memoryview(blob)))

    def has(self, kind: str, name: str) -> bool:
        return self._db.execute("SELECT 1 FROM artifacts WHERE key = ?", (f"{kind}/{name}",)).fetchone() is not None

    def touch(self, kind: str, name: str) -> None:
        """Count a use, so that what is used last is let go last."""
        self._write("UPDATE artifacts SET used = ? WHERE key = ?", (self._tick(), f"{kind}/{name}"))

    def drop(self, kind: str, name: str) -> None:
        key = f"{kind}/{name}"
        row = self._db.execute("SELECT file, bytes FROM artifacts WHERE key = ?", (key,)).fetchone()
        if row is None:
            return
        if row[0] is not None:
            self._doomed.append(self._artifacts / row[0])
        self._write("DELETE FROM artifacts WHERE key = ?", (key,))
        self.bytes_of[kind] -= row[1]

    def shrink(self, kind: str, limit: int, spare: Container[str] = ()) -> list[str]:
        """Let go of the longest unused until at most `limit` bytes are kept; the names that went."""
        gone: list[str] = []
        if self.bytes_of[kind] <= limit:
            return gone
        oldest = self._db.execute("SELECT key, bytes FROM artifacts WHERE kind = ? ORDER BY used", (kind,))
        left = self.bytes_of[kind]
        while left > limit and (row := oldest.fetchone()):
            name = row[0].split("/", 1)[1]
            if name not in spare:
                left -= row[1]
                gone.append(name)
        for name in gone:
            self.drop(kind, name)
        return gone

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # -- models ---------------------------------------------------------------------------------

    def remember_model(self, model: ModelDescription, tokenizer: bytes | None) -> None:
        self._write(
            "INSERT INTO models VALUES(?,?,?) ON CONFLICT(revision) DO UPDATE SET description=excluded.description,"
            " tokenizer=coalesce(excluded.tokenizer, tokenizer)",
            (model.revision, model.model_dump_json(), tokenizer),
        )

    def workspaces(self) -> dict[str, int]:
        """What stages were seen to take beside their weights, in bytes, by stage, model and size."""
        return dict(self._db.execute("SELECT key, bytes FROM workspaces"))

    def remember_workspace(self, key: str, size: int) -> None:
        self._write("INSERT OR REPLACE INTO workspaces VALUES(?,?)", (key, size))

    def tokenizer(self, revision: str) -> bytes | None:
        row = self._db.execute("SELECT tokenizer FROM models WHERE revision = ?", (revision,)).fetchone()
        return row[0] if row else None


def _split(specs: Sequence[tuple[str, str, tuple[int, ...]]], data: memoryview) -> Iterator[Tensor]:
    start = 0
    for name, dtype, shape in specs:
        end = start + math.prod(shape) * ITEMSIZE[dtype]
        yield checked((name, dtype, shape), data[start:end])
        start = end

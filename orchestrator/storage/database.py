"""The SQLite file: opened, checked, upgraded, backed up. WAL mode, `synchronous=FULL`, one writer."""

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from protocol.errors import StateDamaged, StateUnusable

SCHEMA_VERSION = 5
FIRST_SCHEMA = """
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
UPGRADES = {  # from a version
    1: "CREATE TABLE workspaces(key TEXT PRIMARY KEY, bytes INTEGER NOT NULL) WITHOUT ROWID;",
    2: """
ALTER TABLE jobs ADD COLUMN saved INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE artifacts ADD COLUMN checksum INTEGER;
CREATE INDEX jobs_by_end ON jobs(finished);
CREATE TABLE settings(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
""",
    3: "CREATE TABLE paces(key TEXT PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;",
    4: "",  # the file gives space back
}
GIVES_SPACE_BACK = 5  # the first version whose files become smaller
BACKED_UP = ("jobs", "models", "workspaces", "settings", "paces")  # pictures can be made again from their jobs
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Database:
    """The SQLite database; its statements gather in one transaction until `commit`."""

    def __init__(self, path: Path | None) -> None:
        """Open a database; None is for one in memory, which keeps nothing.

        Raises:
            StateDamaged: the file is not what was written.
            StateUnusable: it can't be read or written, or is another release's.
        """
        self.path = path
        self._writing = False
        with explained(path):
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
            self._prepare()
            self._check()

    def _prepare(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version == 0 and tables:
            raise StateUnusable(f"{str(self.path)!r} is another program's database.", "Give another --state DIR.")
        self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # heeded by a new file, and by the next VACUUM
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if version > SCHEMA_VERSION:
            raise StateUnusable(
                f"The job database {str(self.path)!r} has schema {version}; this release knows {SCHEMA_VERSION}.",
                "Use the release that wrote it, or give another folder with --state DIR.",
            )
        steps = [FIRST_SCHEMA] if version == 0 else []
        steps += [sql for old, sql in UPGRADES.items() if old >= version]
        if steps and version < SCHEMA_VERSION:
            self._db.executescript(f"BEGIN; {' '.join(steps)} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            if 0 < version < GIVES_SPACE_BACK:
                self._db.execute("VACUUM")
        else:  # the smallest write, to know that there can be one
            self._db.executescript(f"BEGIN IMMEDIATE; PRAGMA user_version={version}; COMMIT;")

    def _check(self) -> None:
        """Check that the jobs are sound; an artifact is checked when it is read."""
        (found,) = self._db.execute("PRAGMA quick_check(jobs)").fetchone()
        if found != "ok":
            raise damaged(self.path, found)

    def close(self) -> None:
        self.commit()
        self._db.close()

    def write(self, sql: str, values: Sequence[object] = ()) -> int:
        """Run a statement; return how many rows it changed."""
        with explained(self.path):
            if not self._writing:
                self._db.execute("BEGIN IMMEDIATE")
                self._writing = True
            return self._db.execute(sql, values).rowcount

    def commit(self) -> None:
        if self._writing:
            with explained(self.path):
                self._db.execute("COMMIT")
            self._writing = False

    def read(self, sql: str, values: Sequence[object] = ()) -> Iterator[tuple[object, ...]]:
        """Rows, as they come."""
        with explained(self.path):
            yield from self._db.execute(sql, values)

    def first(self, sql: str, values: Sequence[object] = ()) -> tuple[object, ...] | None:
        with explained(self.path):
            row: tuple[object, ...] | None = self._db.execute(sql, values).fetchone()
            return row

    def reclaim(self) -> None:
        """Give the space of what was removed back to the disk."""
        self.commit()
        with explained(self.path):
            self._db.executescript("PRAGMA incremental_vacuum;")  # `execute` would stop after a page
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def write_anew(self) -> None:
        """Put the file, which somebody has removed while it was open, in its place again, as of now."""
        assert self.path is not None
        self.commit()
        draft = self.path.with_name(f"{self.path.name}.again")
        draft.unlink(missing_ok=True)
        with explained(draft):
            self._db.execute("VACUUM INTO ?", (str(draft),))
        sync(draft)
        for rest in ("-wal", "-shm"):
            self.path.with_name(self.path.name + rest).unlink(missing_ok=True)
        if self.path.exists():  # somebody has put another there
            self.path.replace(self.path.with_name(f"{self.path.name}.found"))
        draft.replace(self.path)

    # -- backups --------------------------------------------------------------------------------

    def back_up(self, to: Path) -> None:
        """Copy all but artifacts, whole or not at all, as of the last commit."""
        draft = to.with_name(f"{to.name}.new")
        draft.unlink(missing_ok=True)
        self.commit()
        with explained(draft):
            self._db.execute("ATTACH ? AS backup", (str(draft),))
            try:
                copies = "".join(f"CREATE TABLE backup.{t} AS SELECT * FROM main.{t};" for t in BACKED_UP)
                self._db.executescript(f"BEGIN; {copies} PRAGMA backup.user_version={SCHEMA_VERSION}; COMMIT;")
            finally:
                self._db.execute("DETACH backup")
        sync(draft)
        draft.replace(to)


def restore(path: Path, backup: Path) -> Path | None:
    """Put a backup's jobs in the place of a database, which is put aside; return where it is then, if there was one."""
    if not backup.exists():
        raise StateUnusable(f"There is no backup {str(backup)!r}.", "Give another folder with --state DIR.")
    aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    draft = path.with_name(f"{path.name}.restored")
    for rest in ("", "-wal", "-shm"):
        draft.with_name(draft.name + rest).unlink(missing_ok=True)
    fresh = Database(draft)
    with explained(backup):
        (version,) = next(iter(sqlite3.connect(backup).execute("PRAGMA user_version")))
        if version != SCHEMA_VERSION:
            raise StateUnusable(f"The backup {str(backup)!r} is of another release (schema {version}).")
        fresh._db.execute("ATTACH ? AS backup", (str(backup),))
        for table in BACKED_UP:
            columns = ", ".join(name for _, name, *_ in fresh._db.execute(f"PRAGMA table_info({table})"))
            fresh.write(f"INSERT INTO main.{table}({columns}) SELECT {columns} FROM backup.{table}")
        fresh.commit()
        fresh._db.execute("DETACH backup")
        fresh._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fresh.close()
    there = path.exists()
    for rest in ("-wal", "-shm", ""):
        if path.with_name(path.name + rest).exists():
            shutil.move(path.with_name(path.name + rest), aside.with_name(aside.name + rest))
    draft.replace(path)
    return aside if there else None


def peek(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a database that may be in use by another process, which notices nothing; StateUnusable, StateDamaged."""
    with explained(path), contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return list(db.execute(sql))


@contextlib.contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """Raise SQLite's errors as ours: StateDamaged, StateUnusable."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in DAMAGE:
            raise damaged(path, str(error)) from error
        raise StateUnusable(
            f"The job database {str(path)!r} can't be used: {error}.",
            "Make room or make it writable, or give another folder with --state DIR.",
        ) from error


def damaged(path: Path | None, found: str) -> StateDamaged:
    return StateDamaged(
        f"The job database {str(path)!r} is damaged: {found}.",
        "'triptych up --restore' goes on from its last backup and keeps the damaged file; "
        "or give another folder with --state DIR.",
    )


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())

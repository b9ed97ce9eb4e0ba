"""What has been run, in one SQLite file that later runs extend and several processes may write to."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from multitune.comparing.records import Outcome, Record, Trial
from multitune.errors import DataError

FILE = "store.sqlite"
"""Name of the store in the folder of a comparison."""
RECIPE_FILE = "recipe.yaml"
"""Name of the recipe beside it."""

_FORMAT = 1
#: Seconds to wait for another process that writes.
_PATIENCE = 60.0
#: A trial is run once, whatever it is used for: two budgets, or the search and the final runs, may share it.
_TABLES = """
CREATE TABLE IF NOT EXISTS trials (
    key TEXT PRIMARY KEY, grouped TEXT NOT NULL, task TEXT NOT NULL, method TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL, score REAL, trial TEXT NOT NULL, outcome TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS trials_by_task ON trials (task, method);
CREATE TABLE IF NOT EXISTS uses (
    key TEXT NOT NULL REFERENCES trials (key), purpose TEXT NOT NULL, budget TEXT NOT NULL,
    PRIMARY KEY (key, purpose, budget)
);
"""


_PUT = """
INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET status = excluded.status, score = excluded.score, outcome = excluded.outcome
WHERE trials.status = 'failed'
"""


class Store:
    """Finished trials by key. Every `add` is on the disk when it returns."""

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it.

        Raises:
            DataError: the file is no store, or one of a later version; or its folder is a file.
        """
        self.path = Path(path)
        if self.path.parent.is_file():
            raise DataError(f"{self.path.parent} is a file; give a folder, which is made if it is not there")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + _PATIENCE
        while not self._is_ready():
            if time.monotonic() > until:
                raise DataError(
                    f"{self.path} has been locked by another process for {_PATIENCE:g} s; end that one first"
                )
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        """Whether the tables are there, or could be made; not while another process makes them.

        SQLite waits for a lock by itself, but not for the one with which a file is switched to a WAL.
        """
        try:
            with self._connection() as connection:
                self._make_tables(connection)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:  # the lower byte says of what kind it is
                return False
            raise DataError(f"{self.path} cannot be read as a store of trials: {error}; give another folder") from error
        return True

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        """Make the tables of a new file; refuse a file that is something else."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > _FORMAT:
            raise DataError(
                f"{self.path} is a store of format {version}, and this version of multitune reads up to {_FORMAT}; "
                f"update multitune, or give another folder"
            )
        if version < _FORMAT:
            there = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            if {name for (name,) in there} - {"trials", "uses"}:
                raise DataError(f"{self.path} is an SQLite file of something else; give another folder")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_FORMAT}; COMMIT;")

    def add(self, record: Record) -> None:
        """Keep a record. A trial that is there keeps its outcome, unless that is a failure and the record is of a later
        try; the record's purpose and budget are added to it.
        """
        trial, outcome = record.trial, record.outcome
        values = record.to_dict()
        row = (
            trial.key, trial.group, trial.task, trial.method, trial.seed, outcome.status, outcome.score,
            json.dumps(values["trial"], sort_keys=True), json.dumps(values["outcome"], sort_keys=True),
        )  # fmt: skip
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_PUT, row)
            use = (trial.key, record.purpose, record.budget or "")
            connection.execute("INSERT OR IGNORE INTO uses VALUES (?, ?, ?)", use)
            connection.execute("COMMIT")

    def has(self, key: str, *, finished: bool = False) -> bool:
        """Whether the trial of this key has been run, and if asked, did not fail."""
        with self._open() as connection:
            found = connection.execute("SELECT status FROM trials WHERE key = ?", (key,)).fetchone()
        return found is not None and not (finished and found[0] == "failed")

    def outcome(self, key: str) -> Outcome | None:
        """What the trial of this key gave, if it has been run."""
        with self._open() as connection:
            found = connection.execute("SELECT outcome FROM trials WHERE key = ?", (key,)).fetchone()
        return None if found is None else _outcome(found[0])

    def records(
        self, *, purpose: Literal["search", "final"] | None = None, tasks: Sequence[str] | None = None
    ) -> list[Record]:
        """The records in the order in which their trials ended, one for every purpose and budget of a trial.

        Args:
            purpose: only those of this purpose.
            tasks: only those of these tasks.
        """
        query = (
            "SELECT trial, outcome, purpose, budget FROM uses JOIN trials USING (key) "
            "WHERE (?1 IS NULL OR purpose = ?1) ORDER BY trials.rowid, uses.rowid"
        )
        with self._open() as connection:
            rows = connection.execute(query, (purpose,)).fetchall()
        found = [
            Record(trial=Trial(**json.loads(trial)), outcome=_outcome(outcome), purpose=use, budget=budget or None)
            for trial, outcome, use, budget in rows
        ]
        return [r for r in found if tasks is None or r.trial.task in tasks]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection to the store that was opened.

        Raises:
            DataError: the file is gone, its disk is full, or the system refuses it in another way.
        """
        try:
            with self._connection() as connection:
                yield connection
        except sqlite3.OperationalError as error:
            why = f"{error}" if self.path.parent.is_dir() else "its folder was moved or removed meanwhile"
            raise DataError(
                f"{self.path} cannot be read or written: {why}; the trials that it holds are kept: once it is there "
                f"and may be written to, the same command goes on"
            ) from error

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of this call's own: none is ever carried into another thread or process."""
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = FULL")  # WAL's usual setting loses the last commits with the power
            yield connection
        finally:
            connection.close()


def _outcome(text: str) -> Outcome:
    values = json.loads(text)
    values["history"] = tuple(values["history"])
    if values["row_scores"] is not None:
        values["row_scores"] = tuple(values["row_scores"])
    return Outcome(**values)

"""A file with the replies of a judge's model, so that a restart repeats no answered request."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from nemo_care.errors import InputError


class ReplyCache:
    """Replies by question, in one SQLite file that threads and processes share.

    It uses the default journal: the write-ahead log is faster but does not work on network file
    systems, which replicas on several machines share.
    """

    def __init__(self, path: Path) -> None:
        """Open the cache; raises InputError if `path` can't be opened, or is a different file."""
        self._path, self._lock = path, Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(str(error.strerror)) from error
        with self._statements():
            # No isolation level: each statement is a transaction, written when it returns.
            self._database = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master")}
            if tables and "llm_judge_replies" not in tables:
                raise self._unusable("it is a different database")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS llm_judge_replies "
                "(question TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"
            )

    def get(self, question: str) -> str | None:
        """Return the reply, None if there is none. Raises InputError if the file fails."""
        with self._statements():
            row = self._database.execute(
                "SELECT reply FROM llm_judge_replies WHERE question = ?", (question,)
            ).fetchone()
        if row is not None and not isinstance(row[0], str):
            raise self._unusable("a reply in it is not text")
        return None if row is None else row[0]

    def put(self, question: str, reply: str) -> None:
        """Store a reply; on disk when this returns. Raises InputError if the file fails."""
        with self._statements():
            self._database.execute(
                "INSERT OR REPLACE INTO llm_judge_replies VALUES (?, ?)", (question, reply)
            )

    def close(self) -> None:
        """Close the file, which can't be used afterwards."""
        self._database.close()

    @contextmanager
    def _statements(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise self._unusable(str(error)) from error

    def _unusable(self, cause: str) -> InputError:
        return InputError(
            f"{self._path}: the judge's replies can't be kept there ({cause}); repair or move that "
            "file, or choose a different one with evaluation.llm.cache"
        )

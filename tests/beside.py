"""Changes of a SQLite database as another program on this machine could make them."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path


def execute(file: Path, statement: str, *values: object) -> None:
    """Run a statement and commit it."""
    with closing(sqlite3.connect(file, timeout=10)) as database, database:
        database.execute(statement, values)


async def change(file: Path, statement: str, *values: object) -> None:
    """The same while transactions of this process go on, whose ends need the event loop."""
    await asyncio.to_thread(execute, file, statement, *values)

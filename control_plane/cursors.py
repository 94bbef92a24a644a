"""Cursors of lists: where the next page begins, as a text that clients give back and do not read."""

from __future__ import annotations

import base64
import re

from common.errors import InvalidRequest


def cursor_of(time: int, row_id: object) -> str:
    """The page after the row of this time (milliseconds) and id."""
    return base64.urlsafe_b64encode(f"{time}:{row_id}".encode()).decode().rstrip("=")


def parse_cursor(cursor: str, pattern: re.Pattern[str]) -> tuple[int, str]:
    """Time and id; ``pattern`` has a group for each. Raises InvalidRequest."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        text = ""
    match = pattern.fullmatch(text)
    if match is None:
        raise InvalidRequest("cursor is not one that this server gave.", field="cursor")
    return int(match[1]), match[2]
